//! For the tests of snapshots: where caches lie, and what is handed over.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::OFlag;

use super::clips::{CLIP, MIB, options};
use super::xfs::Xfs;
use super::{content, need_root, put, rclones, rig_with};
use vmafx_bypass::rig::Rig;
use vmafx_bypass::snapshot::{SnapshotKind, SnapshotMode, SnapshotOptions, Snapshots, Whole};
use vmafx_bypass::{Reason, Refusal};

/// When a clip is said to have been replaced.
pub const LATER: &str = "2031-01-01 00:00:00 UTC";
/// One clip.
pub const WHOLE: &[(&str, usize)] = &[(CLIP, 8 * MIB)];
/// What rclone needs to see a change at the remote soon.
pub const QUICK: &[&str] = &["--dir-cache-time=1s", "--attr-timeout=1s"];

pub fn snapshots(mode: SnapshotMode, copy_budget: usize) -> Snapshots {
    Snapshots::new(SnapshotOptions {
        mode,
        copy_budget: copy_budget as u64,
    })
}

/// With sealed copies, and with those of huge pages.
pub fn of_both(copy_budget: usize) -> [Snapshots; 2] {
    let options = SnapshotOptions {
        mode: SnapshotMode::Auto,
        copy_budget: copy_budget as u64,
    };
    [Snapshots::new(options), Snapshots::of_huge_pages(options)]
}

/// Runs a test on each rclone, with clips of these sizes that are cached whole:
/// with the cache on a file system that has no reflinks, and on one that has.
pub fn each_place(
    clips: &[(&str, usize)],
    arguments: &[&str],
    test: impl Fn(&mut Rig, SnapshotKind),
) {
    need_root();
    for kind in [SnapshotKind::Copy, SnapshotKind::Reflink] {
        for rclone in rclones() {
            let xfs = (kind == SnapshotKind::Reflink).then(Xfs::new);
            let mut rig = rig_with(options(&rclone, arguments), |source| {
                if let Some(xfs) = &xfs {
                    xfs.take_cache(source);
                }
                for (seed, (name, size)) in clips.iter().enumerate() {
                    put(source, name, &content(seed as u32 + 1, *size));
                }
            });
            for (name, _) in clips {
                rig.cache_whole(Path::new(name)).unwrap();
            }
            test(&mut rig, kind);
            drop(rig);
        }
    }
}

/// A descriptor that only says which file it is.
pub fn path_only(path: &Path) -> OwnedFd {
    File::options()
        .read(true)
        .custom_flags(OFlag::O_PATH.bits())
        .open(path)
        .unwrap()
        .into()
}

/// Asks for a clip as a supervisor does.
pub fn ask(snapshots: &Snapshots, path: &Path) -> Result<Whole, Refusal> {
    snapshots.open(path_only(path).as_fd())
}

/// All bytes of a descriptor's file, wherever its offset is.
pub fn bytes_of(fd: impl AsFd) -> Vec<u8> {
    let file = File::from(fd.as_fd().try_clone_to_owned().unwrap());
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Tries to open a descriptor's file for writing, as whoever got it can.
pub fn writable(fd: impl AsFd) -> std::io::Result<File> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    fs::OpenOptions::new().write(true).open(path)
}

/// A shared mapping of a file, for reading; holds no descriptor.
pub struct Map(*mut nix::libc::c_void, usize);

impl Map {
    pub fn of(fd: impl AsFd) -> Self {
        use nix::libc::{MAP_FAILED, MAP_SHARED, PROT_READ, mmap};
        use std::os::fd::AsRawFd;
        let fd = fd.as_fd();
        let size = rustix::fs::fstat(fd).unwrap().st_size as usize;
        // SAFETY: a new mapping, where the kernel chooses.
        let map = unsafe {
            mmap(
                std::ptr::null_mut(),
                size,
                PROT_READ,
                MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        assert_ne!(map, MAP_FAILED);
        Self(map, size)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: what was mapped, of which nothing was lent.
        unsafe { nix::libc::munmap(self.0, self.1) };
    }
}

/// Why nothing was handed over.
pub fn reason(result: Result<Whole, Refusal>) -> Reason {
    let refusal = result.unwrap_err();
    println!("{refusal}");
    refusal.reason
}
