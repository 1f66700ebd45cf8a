"""Every system call and errno that a POSIX filesystem must answer, asked of two filesystems.

A *case* is a function that is given an empty directory (its working directory), makes system calls
and returns what it saw: errno names, values, relations between times. `test_posix` runs each case
on a csvfs mount and on the machine's own filesystem and compares. The cases cover the ground of the
public suite pjdfstest, written anew.
"""
