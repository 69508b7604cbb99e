//! rclone's metadata files: parsed, and read so that a torn write is noticed.
//!
//! rclone truncates and rewrites them in place without fsync (vfscache/item.go,
//! `_save`), so that a reader can see them empty, cut off, or mixed.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::fcntl::OFlag;
use serde::Deserialize;

use crate::cache::proof::{Fingerprint, Metadata, Timestamp};
use crate::cache::ranges::Ranges;
use crate::reason::{Reason, Refusal};

/// The fields of vfscache/item.go's `Info`, unchanged from rclone 1.53 to 1.76.
/// A file with others was written by an rclone that nobody has looked at.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct Info {
    #[serde(rename = "ModTime")]
    _mod_time: String,
    #[serde(rename = "ATime")]
    _a_time: String,
    size: u64,
    rs: Option<Vec<Range>>,
    fingerprint: String,
    dirty: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct Range {
    pos: u64,
    size: u64,
}

/// Parses the bytes of a metadata file.
///
/// # Errors
/// [`Reason::BadMetadata`] unless it is one complete JSON document of known
/// fields whose ranges are sorted.
pub fn parse(bytes: &[u8]) -> Result<Metadata, Refusal> {
    let bad = |detail: String| Refusal::new(Reason::BadMetadata, detail);
    let info: Info = serde_json::from_slice(bytes).map_err(|e| bad(format!("metadata: {e}")))?;
    let pairs: Vec<(u64, u64)> = info
        .rs
        .unwrap_or_default()
        .iter()
        .map(|r| (r.pos, r.size))
        .collect();
    let ranges = Ranges::from_sorted(&pairs, info.size)
        .ok_or_else(|| bad("metadata: its ranges are not sorted".into()))?;
    Ok(Metadata {
        size: info.size,
        ranges,
        dirty: info.dirty,
        fingerprint: parse_fingerprint(&info.fingerprint),
    })
}

/// `size[,time][,hash]` (fs/fingerprint.go); an empty or odd one is none.
fn parse_fingerprint(text: &str) -> Option<Fingerprint> {
    let mut fields = text.split(',');
    let size = fields.next()?.parse().ok()?;
    let modified = fields.next().and_then(parse_go_time);
    Some(Fingerprint { size, modified })
}

/// Go's UTC form, trailing zeros of the fraction trimmed:
/// `2020-09-13 12:26:40.123456716 +0000 UTC`. `None` before 1970.
fn parse_go_time(text: &str) -> Option<Timestamp> {
    let text = text.strip_suffix(" +0000 UTC")?;
    let since = humantime::parse_rfc3339_weak(text)
        .ok()?
        .duration_since(UNIX_EPOCH)
        .ok()?;
    Some(Timestamp {
        seconds: i64::try_from(since.as_secs()).ok()?,
        nanos: since.subsec_nanos(),
    })
}

/// What stat(2) shows of a metadata file; rewritten, it differs, unless within
/// one tick of the kernel's clock and at equal size.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    dev: u64,
    ino: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    /// Removed, it has none.
    links: u64,
}

impl Stamp {
    /// When it was last written, nanoseconds since 1970.
    fn modified_ns(&self) -> i128 {
        i128::from(self.modified.0) * 1_000_000_000 + i128::from(self.modified.1)
    }
}

impl From<&fs::Metadata> for Stamp {
    fn from(m: &fs::Metadata) -> Self {
        Self {
            dev: m.dev(),
            ino: m.ino(),
            size: m.size(),
            modified: (m.mtime(), m.mtime_nsec()),
            changed: (m.ctime(), m.ctime_nsec()),
            links: m.nlink(),
        }
    }
}

impl From<&rustix::fs::Stat> for Stamp {
    // The count of links has another width on arm64.
    #[allow(clippy::useless_conversion)]
    fn from(stat: &rustix::fs::Stat) -> Self {
        Self {
            dev: stat.st_dev,
            ino: stat.st_ino,
            size: stat.st_size as u64,
            modified: (stat.st_mtime, stat.st_mtime_nsec as i64),
            changed: (stat.st_ctime, stat.st_ctime_nsec as i64),
            links: u64::from(stat.st_nlink),
        }
    }
}

/// Two ticks of the slowest kernel clock (CONFIG_HZ=100), nanoseconds.
const TWO_TICKS_NS: i128 = 20_000_000;
/// Larger than any metadata file: one of 100,000 ranges has about 6 MB.
const MAX_BYTES: u64 = 64 << 20;
/// How long rclone may take to write one again, on a busy host.
const REWRITE: Duration = Duration::from_millis(100);
/// Reads of a file that nobody has written lately and that still is not whole,
/// before it is given up: such a one was damaged.
const TRIES: u32 = 4;
/// A file that was written so lately, nanoseconds, may be in the middle of it:
/// its writer can lose the CPU for long between cutting and filling it.
const LATELY_NS: i128 = 1_000_000_000;

/// A metadata file as it was read: complete, twice the same.
#[derive(Debug)]
pub(crate) struct MetadataFile {
    path: PathBuf,
    /// Held, so that a look at it need not find its path.
    file: File,
    /// The file's whole content.
    pub(crate) bytes: Vec<u8>,
    /// Whose it is.
    pub(crate) owner: u32,
    stamp: Stamp,
    /// Written so shortly before it was read that a further write might leave
    /// the same stamp.
    racy: bool,
}

impl MetadataFile {
    /// As [`unchanged`](Self::unchanged), by the file that was read alone, at a
    /// quarter of the cost: rclone's own rewriting, removing and renaming of it
    /// show there (its time, its links, its change time), but not that somebody
    /// has renamed a folder above it.
    pub(crate) fn unchanged_in_place(&mut self) -> bool {
        if self.racy {
            return self.unchanged();
        }
        rustix::fs::fstat(&self.file).is_ok_and(|stat| Stamp::from(&stat) == self.stamp)
    }

    /// Whether the file names the same version as before, though rclone may have
    /// written it again, as it does when a clip is opened and closed: the same
    /// size and fingerprint, its hash included, and nothing to upload. What it
    /// says now is taken over.
    pub(crate) fn is_same_version_still(&mut self) -> bool {
        if self.unchanged() {
            return true;
        }
        let deadline = Instant::now() + REWRITE;
        loop {
            match read_metadata(&self.path) {
                Ok(now) if is_same_version(&now.bytes, &self.bytes) => {
                    *self = now;
                    return true;
                }
                // It is being written at the moment.
                Err(refusal)
                    if refusal.reason == Reason::BadMetadata && Instant::now() < deadline => {}
                _ => return false,
            }
        }
    }

    /// Whether the file still is what was read, and still under its path.
    pub(crate) fn unchanged(&mut self) -> bool {
        if !self.racy {
            return fs::metadata(&self.path).is_ok_and(|m| Stamp::from(&m) == self.stamp);
        }
        match read_once(&self.path) {
            Ok(Attempt::Whole(now)) if now.bytes == self.bytes && now.stamp == self.stamp => {
                self.racy = now.racy;
                true
            }
            _ => false,
        }
    }
}

/// Whether two readings of a metadata file name one version, with nothing to
/// upload.
pub(crate) fn is_same_version(a: &[u8], b: &[u8]) -> bool {
    let info = |bytes| serde_json::from_slice::<Info>(bytes).ok();
    match (info(a), info(b)) {
        (Some(a), Some(b)) => {
            let same = (a.size, &a.fingerprint) == (b.size, &b.fingerprint);
            same && !a.fingerprint.is_empty() && !a.dirty && !b.dirty
        }
        _ => false,
    }
}

/// A number for a metadata file's fingerprint, hash included: others have another.
#[cfg(feature = "mount")]
pub(crate) fn fingerprint_mark(bytes: &[u8]) -> Option<u64> {
    use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
    let info: Info = serde_json::from_slice(bytes).ok()?;
    Some(BuildHasherDefault::<DefaultHasher>::new().hash_one(info.fingerprint))
}

/// Reads a metadata file so that no torn or mixed write passes.
///
/// # Errors
/// [`Reason::NoMetadata`] where there is none, [`Reason::Permission`],
/// [`Reason::BadMetadata`] where it kept changing, [`Reason::IoError`].
pub(crate) fn read_metadata(path: &Path) -> Result<MetadataFile, Refusal> {
    let deadline = Instant::now() + REWRITE;
    let mut tries = 0;
    loop {
        match read_once(path) {
            Ok(Attempt::Whole(file)) => return Ok(*file),
            // rclone writes it in well under a millisecond, if it gets a CPU.
            Ok(Attempt::Torn { lately }) => {
                tries += 1;
                let given_up = if lately {
                    Instant::now() >= deadline
                } else {
                    tries >= TRIES
                };
                if given_up {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(Refusal::new(
                    Reason::NoMetadata,
                    format!("`{}`: no such file", path.display()),
                ));
            }
            Err(e) => {
                return Err(Refusal::from_io(
                    format_args!("`{}`", path.display()),
                    &e,
                    Reason::IoError,
                ));
            }
        }
    }
    Err(Refusal::new(
        Reason::BadMetadata,
        format!("`{}`: kept changing while it was read", path.display()),
    ))
}

/// What came of one attempt.
enum Attempt {
    Whole(Box<MetadataFile>),
    /// The content was not stable or not complete; `lately`: and was written
    /// just now.
    Torn {
        lately: bool,
    },
}

/// One attempt.
fn read_once(path: &Path) -> io::Result<Attempt> {
    // The clock first: time that passes while reading must not hide a race.
    let now = now_ns();
    // Who put a FIFO there is not waited for, and a symlink is nobody's metadata.
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_NOFOLLOW).bits())
        .open(path)?;
    let found = file.metadata()?;
    let (owner, before) = (found.uid(), Stamp::from(&found));
    if before.size > MAX_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "too large for a metadata file",
        ));
    }
    let lately = now - before.modified_ns() < LATELY_NS;
    let mut first = vec![0; before.size as usize];
    let mut second = first.clone();
    for copy in [&mut first, &mut second] {
        match file.read_exact_at(copy, 0) {
            // It has been cut since.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Ok(Attempt::Torn { lately: true });
            }
            read => read?,
        }
    }
    let stable = first == second
        && Stamp::from(&file.metadata()?) == before
        && Stamp::from(&fs::metadata(path)?) == before
        && first.trim_ascii_end().last() == Some(&b'}');
    if !stable {
        return Ok(Attempt::Torn { lately });
    }
    Ok(Attempt::Whole(Box::new(MetadataFile {
        path: path.to_path_buf(),
        file,
        bytes: first,
        owner,
        racy: is_racy(before.modified_ns(), now),
        stamp: before,
    })))
}

fn now_ns() -> i128 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos() as i128)
}

fn is_racy(modified_ns: i128, now_ns: i128) -> bool {
    // A time in the future says nothing: the clock was set.
    now_ns - modified_ns < TWO_TICKS_NS
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(size: u64, rs: &str, fingerprint: &str, dirty: bool) -> String {
        format!(
            "{{\"ModTime\":\"2026-11-22T19:41:34.8Z\",\"ATime\":\"2026-11-22T19:41:35Z\",\
             \"Size\":{size},\"Rs\":{rs},\"Fingerprint\":\"{fingerprint}\",\"Dirty\":{dirty}}}"
        )
    }

    #[test]
    fn parses_what_rclone_writes() {
        let json = text(
            3_145_728,
            "[{\"Pos\":0,\"Size\":4194304}]",
            "3145728,2020-09-13 12:26:40.123456716 +0000 UTC,5d41402a",
            false,
        );
        let meta = parse(json.as_bytes()).unwrap();
        // Ranges beyond the size are cut off.
        assert_eq!(meta.ranges.bytes(), 3_145_728);
        let time = meta.fingerprint.unwrap().modified.unwrap();
        assert_eq!((time.seconds, time.nanos), (1_600_000_000, 123_456_716));
    }

    #[test]
    fn fingerprints_without_a_time_or_at_all() {
        let time = |f: &str| parse_fingerprint(f).map(|f| (f.size, f.modified.is_some()));
        assert_eq!(time(""), None);
        assert_eq!(time("-1,2020-09-13 12:26:40 +0000 UTC"), None);
        assert_eq!(time("5"), Some((5, false)));
        assert_eq!(time("5,5d41402a"), Some((5, false)));
        assert_eq!(time("5,2020-09-13 12:26:40 +0000 UTC"), Some((5, true)));
        assert_eq!(time("5,2020-09-13 12:26:40 +0200 CEST"), Some((5, false)));
        assert_eq!(time("5,1960-01-01 00:00:00 +0000 UTC"), Some((5, false)));
        let nanos = |f| parse_go_time(f).map(|t| t.nanos);
        assert_eq!(nanos("2020-09-13 12:26:40.5 +0000 UTC"), Some(500_000_000));
    }

    #[test]
    fn refuses_torn_unknown_and_insane_metadata() {
        let whole = text(10, "null", "", false);
        for cut in 0..whole.len() {
            assert!(parse(&whole.as_bytes()[..cut]).is_err(), "cut at {cut}");
        }
        assert!(parse(whole.as_bytes()).is_ok());
        let doubled = format!("{whole}{whole}");
        let unknown = whole.replacen('{', "{\"New\":1,", 1);
        let negative = text(10, "[{\"Pos\":-1,\"Size\":5}]", "", false);
        let unsorted = text(
            10,
            "[{\"Pos\":5,\"Size\":5},{\"Pos\":0,\"Size\":1}]",
            "",
            false,
        );
        for bad in [doubled, unknown, negative, unsorted] {
            assert_eq!(
                parse(bad.as_bytes()).unwrap_err().reason,
                Reason::BadMetadata
            );
        }
    }

    #[test]
    fn reading_tells_missing_empty_and_changed_files_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meta");
        let reason = |p: &Path| read_metadata(p).unwrap_err().reason;
        assert_eq!(reason(&path), Reason::NoMetadata);
        fs::write(&path, "").unwrap();
        assert_eq!(reason(&path), Reason::BadMetadata);
        fs::write(&path, text(10, "null", "a", false)).unwrap();
        let mut file = read_metadata(&path).unwrap();
        assert!(file.unchanged());
        // The same size, most likely within the same tick: the bytes tell.
        fs::write(&path, text(10, "null", "b", false)).unwrap();
        assert!(!file.unchanged());
    }

    #[test]
    fn a_writer_that_lost_the_cpu_is_waited_for_and_damage_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meta");
        let whole = text(10, "null", "a", false);
        fs::write(&path, &whole[..20]).unwrap();
        let (slow, rest) = (path.clone(), whole.clone());
        let writer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            fs::write(slow, rest)
        });
        assert_eq!(read_metadata(&path).unwrap().bytes, whole.as_bytes());
        writer.join().unwrap().unwrap();
        fs::write(&path, &whole[..20]).unwrap();
        let old = SystemTime::now() - Duration::from_secs(5);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(old).unwrap();
        let started = Instant::now();
        let reason = read_metadata(&path).unwrap_err().reason;
        assert_eq!(reason, Reason::BadMetadata);
        assert!(started.elapsed() < REWRITE, "{:?}", started.elapsed());
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meta");
        fs::write(&path, text(10, "null", "a", false)).unwrap();
        let mut file = read_metadata(&path).unwrap();
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let refused = read_metadata(&path).is_err();
            tell.send(refused && !file.unchanged() && !file.is_same_version_still())
        });
        assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok(true));
    }

    #[test]
    fn a_fresh_file_is_racy_and_an_old_one_is_not() {
        assert!(is_racy(100, 100 + TWO_TICKS_NS - 1));
        assert!(!is_racy(100, 100 + TWO_TICKS_NS));
        assert!(is_racy(101, 100));
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_refuse(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn any_fingerprint_parses_or_is_none(text in "\\PC{0,60}") {
            let _ = parse_fingerprint(&text);
        }
    }
}
