"""What a host needs around a mount: FUSE, files in /run and /etc, the admin socket, logs."""
