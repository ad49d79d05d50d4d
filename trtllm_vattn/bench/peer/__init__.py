"""What runs in another engine's process and interpreter: scripts of one file each, which need nothing of this package.

They are run by their path, so that their folder is the first that Python looks for modules in; nothing else lies here.
"""
