//! The kernel's mount table: which superblock a path is on, and where.
//!
//! Source: proc_pid_mountinfo(5).

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The file system type of an `rclone mount`.
pub const RCLONE_FSTYPE: &str = "fuse.rclone";

/// The file system type of our own mounts.
pub const REEXPORT_FSTYPE: &str = "fuse.vmafx-bypass";

/// A superblock's device number in the kernel's own encoding, `major << 20 | minor`
/// (include/linux/kdev_t.h), which is what BPF programs see in `s_dev`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Dev(pub u32);

impl Dev {
    /// From a major and a minor number.
    #[must_use]
    pub fn new(major: u32, minor: u32) -> Self {
        Self(major << 20 | (minor & 0xf_ffff))
    }

    /// From the `st_dev` of stat(2).
    #[must_use]
    pub fn from_st_dev(st_dev: u64) -> Self {
        let major = nix::sys::stat::major(st_dev);
        let minor = nix::sys::stat::minor(st_dev);
        Self::new(major as u32, minor as u32)
    }

    /// The major number; 0 for FUSE.
    #[must_use]
    pub fn major(self) -> u32 {
        self.0 >> 20
    }

    /// The minor number.
    #[must_use]
    pub fn minor(self) -> u32 {
        self.0 & 0xf_ffff
    }
}

impl fmt::Display for Dev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major(), self.minor())
    }
}

/// One line of the mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The mount's id, as statx(2) reports it in `stx_mnt_id`.
    pub id: u64,
    /// The superblock.
    pub dev: Dev,
    /// The folder of the superblock that is mounted: `/`, or another for a bind mount.
    pub root: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
    /// The file system's type and subtype: `fuse.rclone`.
    pub fstype: String,
    /// What is mounted; for rclone `Name:Root`, or a path for the local backend.
    pub source: OsString,
    /// Whether the *superblock* is read-only. A read-only bind mount of a
    /// writable superblock is writable here.
    pub read_only: bool,
    /// Of a FUSE mount: the user who has mounted it.
    pub user: Option<u32>,
}

impl Mount {
    /// Whether this is an `rclone mount`.
    #[must_use]
    pub fn is_rclone(&self) -> bool {
        self.fstype == RCLONE_FSTYPE
    }

    /// Whether this is a mount of `vmafx-bypass mount`.
    #[must_use]
    pub fn is_reexport(&self) -> bool {
        self.fstype == REEXPORT_FSTYPE
    }

    /// Whether this is a FUSE mount of any kind.
    #[must_use]
    pub fn is_fuse(&self) -> bool {
        matches!(self.fstype.as_str(), "fuse" | "fuseblk") || self.fstype.starts_with("fuse.")
    }

    /// The path inside the superblock, without a leading slash, of an absolute
    /// path below the mount point.
    #[must_use]
    pub fn inside(&self, path: &Path) -> Option<PathBuf> {
        let below = path.strip_prefix(&self.point).ok()?;
        let root = self.root.strip_prefix("/").unwrap_or(&self.root);
        Some(join(root, below))
    }

    /// The absolute path, seen through this mount, of a path inside the superblock.
    #[must_use]
    pub fn outside(&self, inside: &Path) -> Option<PathBuf> {
        let root = self.root.strip_prefix("/").unwrap_or(&self.root);
        Some(join(&self.point, inside.strip_prefix(root).ok()?))
    }
}

/// `Path::join` without the trailing slash that an empty right side brings.
fn join(left: &Path, right: &Path) -> PathBuf {
    if right.as_os_str().is_empty() {
        left.to_path_buf()
    } else {
        left.join(right)
    }
}

/// The mount table, in the kernel's order: a later mount covers an earlier one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountTable(Vec<Mount>);

impl MountTable {
    /// Reads the calling process's mount table.
    ///
    /// # Errors
    /// Where `/proc` is not mounted.
    pub fn read() -> io::Result<Self> {
        fs::read("/proc/self/mountinfo").map(|bytes| Self::parse(&bytes))
    }

    /// Parses the text of `/proc/<pid>/mountinfo`. A line that does not parse is
    /// left out: what is on it counts as not mounted, and so is read through FUSE.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        Self(
            bytes
                .split(|&b| b == b'\n')
                .filter_map(parse_line)
                .collect(),
        )
    }

    /// Every mount.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Mount> {
        self.0.iter()
    }

    /// The mount with this id.
    #[must_use]
    pub fn by_id(&self, id: u64) -> Option<&Mount> {
        self.0.iter().find(|m| m.id == id)
    }

    /// The mount that an absolute path without symlinks is on.
    #[must_use]
    pub fn containing(&self, path: &Path) -> Option<&Mount> {
        // The longest mount point, and of equals the last: it covers the others.
        self.0
            .iter()
            .filter(|m| path.starts_with(&m.point))
            .max_by_key(|m| m.point.as_os_str().len())
    }
}

/// `36 35 98:0 /root /point rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&b| b == b' ');
    let id = number(fields.next()?)?;
    let _parent = fields.next()?;
    let mut dev = fields.next()?.split(|&b| b == b':');
    let dev = Dev::new(number(dev.next()?)?, number(dev.next()?)?);
    let root = PathBuf::from(unescape(fields.next()?));
    let point = PathBuf::from(unescape(fields.next()?));
    let _mount_options = fields.next()?;
    // Optional fields, ended by a lone dash.
    fields.find(|f| *f == b"-")?;
    let fstype = String::from_utf8(fields.next()?.to_vec()).ok()?;
    let source = unescape(fields.next()?);
    let options = fields.next()?;
    let mut options = options.split(|&b| b == b',');
    let read_only = options.clone().any(|o| o == b"ro");
    let user = options.find_map(|o| number(o.strip_prefix(b"user_id=")?));
    Some(Mount {
        id,
        dev,
        root,
        point,
        fstype,
        source,
        read_only,
        user,
    })
}

fn number<T: std::str::FromStr>(field: &[u8]) -> Option<T> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// Undoes the kernel's octal escapes (`\040` for a space; fs/proc_namespace.c).
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = (byte == b'\\' && tail.len() >= 3)
            .then(|| std::str::from_utf8(&tail[..3]).ok())
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(value) = octal {
            out.push(value);
            rest = &tail[3..];
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    OsString::from_vec(out)
}

/// The remote's name and the path inside it of an rclone mount's source, as
/// rclone's `ConfigString` writes them (fs/newfs.go): `web:sub`,
/// `:http{5WsJu}:`, or a path alone for the local backend.
#[must_use]
pub fn split_source(source: &OsStr) -> (OsString, PathBuf) {
    let bytes = source.as_bytes();
    // An on-the-fly remote's name begins with a colon of its own.
    let colon = bytes
        .iter()
        .skip(1)
        .position(|&b| b == b':')
        .map(|i| i + 1)
        .filter(|&i| !bytes[..i].contains(&b'/'));
    match colon {
        Some(colon) => (
            OsStr::from_bytes(&bytes[..colon]).to_os_string(),
            PathBuf::from(OsStr::from_bytes(&bytes[colon + 1..])),
        ),
        None => (OsString::from("local"), PathBuf::from(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TABLE: &[u8] = b"27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
42 27 0:39 / /tmp/x/mnt ro,nosuid,nodev,relatime - fuse.rclone :http{9NGKt}: ro,user_id=0,group_id=0\n\
43 27 0:40 / /m\\040nt rw,relatime shared:7 master:2 - fuse.rclone web:sub rw,user_id=0\n\
44 43 0:40 /a /m\\040nt/bind ro,relatime - fuse.rclone web:sub rw,user_id=0\n\
45 27 0:41 / /tmp/x/mnt rw - fuse.sshfs host: rw\n\
garbage\n";

    #[test]
    fn parses_fields_escapes_and_superblock_options() {
        let table = MountTable::parse(TABLE);
        assert_eq!(table.iter().count(), 5);
        let m = table.by_id(43).unwrap();
        assert_eq!(m.point, Path::new("/m nt"));
        assert_eq!(m.dev, Dev::new(0, 40));
        assert!(!m.read_only && m.is_rclone());
        // A read-only bind of a writable superblock is writable.
        assert!(!table.by_id(44).unwrap().read_only);
        assert!(table.by_id(42).unwrap().read_only);
    }

    #[test]
    fn the_longest_and_last_mount_point_wins() {
        let table = MountTable::parse(TABLE);
        assert_eq!(table.containing(Path::new("/tmp/x/mnt/c")).unwrap().id, 45);
        assert_eq!(table.containing(Path::new("/m nt/bind/c")).unwrap().id, 44);
        assert_eq!(table.containing(Path::new("/m ntx/c")).unwrap().id, 27);
    }

    #[test]
    fn paths_go_through_a_bind_mount_and_back() {
        let table = MountTable::parse(TABLE);
        let bind = table.by_id(44).unwrap();
        let inside = bind.inside(Path::new("/m nt/bind/b/c")).unwrap();
        assert_eq!(inside, Path::new("a/b/c"));
        assert_eq!(bind.outside(&inside).unwrap(), Path::new("/m nt/bind/b/c"));
        assert_eq!(bind.outside(Path::new("other/c")), None);
        assert_eq!(
            bind.inside(Path::new("/m nt/bind")).unwrap(),
            Path::new("a")
        );
    }

    #[test]
    fn sources_split_as_rclone_writes_them() {
        for (source, name, root) in [
            ("web:sub", "web", "sub"),
            ("web:", "web", ""),
            (":http{5WsJu}:", ":http{5WsJu}", ""),
            (":local:/p", ":local", "/p"),
            ("loc{yKcAd}:/p:q", "loc{yKcAd}", "/p:q"),
            ("/data/src", "local", "/data/src"),
            ("/data/a:b", "local", "/data/a:b"),
            ("src/sub", "local", "src/sub"),
            ("", "local", ""),
        ] {
            let (n, r) = split_source(OsStr::new(source));
            assert_eq!((n.to_str(), r.to_str()), (Some(name), Some(root)));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_parse_without_a_panic(bytes: Vec<u8>) {
            let _ = MountTable::parse(&bytes);
            let _ = split_source(OsStr::from_bytes(&bytes));
        }

        #[test]
        fn escaped_points_come_back(name in "[ -~\n\t\u{e4}]{0,40}") {
            let escaped: String = name
                .bytes()
                .flat_map(|b| match b {
                    b' ' | b'\t' | b'\n' | b'\\' | b'#' => format!("\\{b:03o}").into_bytes(),
                    _ => vec![b],
                })
                .map(char::from)
                .collect::<String>();
            let bytes: Vec<u8> = escaped.chars().map(|c| c as u8).collect();
            prop_assert_eq!(unescape(&bytes), OsString::from(name));
        }
    }
}
