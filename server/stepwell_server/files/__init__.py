"""What holds of files, whoever's they are: private to the server's user, changed or not, safe to unpack.

Here belongs what several parts ask of the disk and none of them owns. It may touch the operating system; it knows no
settings, no models, no stores.
"""
