"""Two folders swapped in one step, where the system can: at no moment is either name without
one.
"""

import ctypes
import errno
import os
import sys
from pathlib import Path

# From linux/fs.h and macOS' stdio.h.
RENAME_EXCHANGE = 2
RENAME_SWAP = 2
AT_FDCWD = -100

UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def exchange(one: Path, other: Path) -> bool:
    """Swaps two folders of one file system; False, and nothing done, where it cannot be.

    Raises:
        OSError: when the system can, but does not.
    """
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            failed = library.renamex_np(*names, RENAME_SWAP)
        else:
            failed = library.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE)
    except AttributeError:  # a C library without it
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(one))
