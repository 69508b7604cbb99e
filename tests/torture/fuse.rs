//! What FUSE itself returns: the judge's own reads.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::OFlag;

use crate::cells::CELL;
use crate::judge::View;

/// A way to ask FUSE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// A descriptor of its own, past the page cache: what the daemon says now.
    /// The kernel first writes back what programs have stored.
    Direct,
    /// A descriptor of its own. Opening drops the page cache, since rclone
    /// never lets the kernel keep it.
    Fresh,
}

/// Reads at least a range, to whole cells.
pub fn read(path: &Path, way: Way, offset: u64, length: usize) -> io::Result<View> {
    let flags = match way {
        Way::Direct => OFlag::O_DIRECT,
        Way::Fresh => OFlag::empty(),
    };
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(path)?;
    match read_from(&file, offset, length) {
        // Local file systems want whole blocks; FUSE does not.
        Err(e) if e.kind() == io::ErrorKind::InvalidInput && way == Way::Direct => {
            read(path, Way::Fresh, offset, length)
        }
        result => result,
    }
}

/// As [`read`], by a new description of an open file, wherever it is now.
pub fn read_again(held: &File, offset: u64, length: usize) -> io::Result<View> {
    let link = format!("/proc/self/fd/{}", held.as_raw_fd());
    read(Path::new(&link), Way::Direct, offset, length)
}

/// As [`read`], by an open file, and so by the kernel's page cache.
pub fn read_from(file: &File, offset: u64, length: usize) -> io::Result<View> {
    let cell = CELL as u64;
    let from = offset / cell * cell;
    let asked = ((offset + length as u64).div_ceil(cell) * cell - from) as usize;
    let mut bytes = vec![0; asked];
    let mut done = 0;
    while done < asked {
        match file.read_at(&mut bytes[done..], from + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    bytes.truncate(done);
    Ok(View {
        offset: from,
        asked,
        bytes,
    })
}
