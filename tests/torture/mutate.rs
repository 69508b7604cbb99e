//! Mutators: what happens to clips at the remote and through a writable mount.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::cells::{Stamp, content, hex};
use crate::journal::{Effects, Journal, now};
use crate::random::Random;
use crate::reader::{HOT_MS, hot, hot_place};
use crate::told::Clip;

const KIB: u64 = 1 << 10;
/// Sizes of clips, bytes.
const SIZES: std::ops::Range<u64> = 96 * KIB..1_600 * KIB;

/// How often what is held open is written again, and how many bytes at most:
/// so often that it is dirty in the kernel again as soon as a reader has made
/// the kernel write it back.
const STORES: u64 = 300;
const STORED: u64 = 512;

/// What is done at the remote, in any mount.
pub const REMOTE_KINDS: [&str; 4] = [
    "swap: same size, newer",
    "swap: other size, newer",
    "swap: same size and time",
    "rewrite at the remote",
];
/// What is done through a writable mount.
pub const MOUNT_KINDS: [&str; 11] = [
    "write in place",
    "truncate down",
    "truncate up",
    "append",
    "rewrite",
    "rename over",
    "rename away and back",
    "unlink and recreate",
    "store and msync",
    "store and hold",
    "write and hold",
];

/// Where clips live, and what was done to them.
pub struct World {
    pub source: PathBuf,
    pub staging: PathBuf,
    pub folder: PathBuf,
    pub journal: Journal,
    pub stop: AtomicBool,
}

impl World {
    /// Sleeps, unless all is to end.
    pub fn pause(&self, milliseconds: u64) {
        let mut left = milliseconds;
        while left > 0 && !self.stop.load(Ordering::Relaxed) {
            let step = left.min(50);
            thread::sleep(Duration::from_millis(step));
            left -= step;
        }
    }

    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Changes clips at the remote until the end, each kind in turn.
    pub fn change_remote(&self, clips: &[Clip], seed: u64) {
        let mut random = Random::new(seed);
        for kind in REMOTE_KINDS.iter().cycle() {
            self.pause(random.between(150, 1_000));
            if self.stopped() {
                break;
            }
            let clip = hot(clips, &mut random);
            // A clip that a program has just unlinked cannot be swapped.
            let _ = self.change_at_remote(clip, kind, &mut random);
        }
    }

    fn change_at_remote(
        &self,
        clip: &Clip,
        kind: &'static str,
        random: &mut Random,
    ) -> io::Result<()> {
        let path = self.source.join(&clip.name);
        let old = fs::metadata(&path)?;
        let size = match kind {
            "swap: other size, newer" | "rewrite at the remote" => {
                random.between(SIZES.start, SIZES.end)
            }
            _ => old.len(),
        };
        let time = match kind {
            "swap: same size and time" => old.modified()?,
            // Over HTTP times have seconds alone.
            _ => old.modified()? + Duration::from_secs(1),
        };
        let stamp = self.journal.stamp(clip.file);
        let effects = Effects {
            resized: size != old.len(),
            remote: true,
            fingerprint: Some((size, seconds(time))),
            ..Effects::default()
        };
        let bytes = content(stamp, 0, size as usize);
        let in_place = kind == "rewrite at the remote";
        let detail = format!("{} to {size} bytes", old.len());
        self.journal
            .record(&clip.name, kind, stamp, effects, detail, || {
                if in_place {
                    fs::write(&path, &bytes)?;
                    return set_time(&path, time);
                }
                let staged = self.staging.join(&clip.name);
                fs::write(&staged, &bytes)?;
                set_time(&staged, time)?;
                fs::rename(&staged, &path)
            })
    }

    /// Changes clips through the mount until the end, each kind in turn.
    /// `spare`: a clip that is renamed over others.
    pub fn change_by_mount(&self, clips: &[Clip], spare: &Clip, seed: u64) {
        let mut random = Random::new(seed);
        let mut mapper = Mapper::default();
        for kind in MOUNT_KINDS.iter().cycle() {
            // Once readers have the clip open whose turn it is. After a first
            // write it is dirty, and refused; so what only the kernel knows of,
            // the hardest to see, mostly comes first.
            if !random.one_in(4) {
                let turn = HOT_MS - now() / 1_000_000 % HOT_MS;
                self.pause(turn + random.between(200, 500));
            }
            if !random.one_in(3) {
                let first = random.of(&["store and hold", "store and hold", "write and hold"]);
                // It comes again in its own place.
                let _ = self.change(
                    hot(clips, &mut random),
                    spare,
                    first,
                    &mut random,
                    &mut mapper,
                );
            }
            let mut tries = 0;
            // While the daemon is being replaced, nothing works.
            while !self.stopped() && tries < 20 {
                let clip = hot(clips, &mut random);
                if self
                    .change(clip, spare, kind, &mut random, &mut mapper)
                    .is_ok()
                {
                    break;
                }
                self.pause(50);
                tries += 1;
            }
            if self.stopped() {
                break;
            }
        }
    }

    fn change(
        &self,
        clip: &Clip,
        spare: &Clip,
        kind: &'static str,
        random: &mut Random,
        mapper: &mut Mapper,
    ) -> io::Result<()> {
        let path = self.folder.join(&clip.name);
        let size = fs::metadata(&path).map_or(0, |m| m.len());
        if size < SIZES.start && kind != "unlink and recreate" {
            // Cut too often, or lost: first a clip again.
            return self.change(clip, spare, "unlink and recreate", random, mapper);
        }
        if kind == "rename over" {
            self.fill_spare(spare, random)?;
        }
        // Several versions for what is written again and again.
        let several = kind.ends_with("and hold");
        let stamps: Vec<Stamp> = (0..if several { STORES } else { 1 })
            .map(|_| self.journal.stamp(clip.file))
            .collect();
        let stamp = stamps[stamps.len() - 1];
        let (offset, length) = Self::place(size.max(1), several, random);
        let bytes = |offset: u64, length: u64| content(stamp, offset, length as usize);
        let resized = Effects {
            resized: true,
            ..Effects::default()
        };
        let (effects, detail) = match kind {
            "truncate down" | "truncate up" => (
                Effects {
                    zeros: true,
                    ..resized
                },
                format!("of {size} by {length}"),
            ),
            "rename over" => (
                Effects {
                    brings: Some(spare.file),
                    ..resized
                },
                format!("by {}", spare.name),
            ),
            "append" | "rewrite" | "unlink and recreate" | "rename away and back" => {
                (resized, format!("{size} bytes"))
            }
            _ => (Effects::default(), format!("at {offset} +{length}")),
        };
        let hold = random.between(300, 1_200);
        // With --write-back-cache the kernel reads around what is written,
        // which rclone refuses a descriptor that is open for writing alone.
        let readable = random.one_in(2);
        let open = || {
            let mut options = OpenOptions::new();
            options.read(readable);
            options
        };
        let other = self.folder.join("away");
        let new_size = random.between(SIZES.start, SIZES.end);
        self.journal
            .record(&clip.name, kind, stamp, effects, detail, || match kind {
                "write in place" => {
                    let file = open().write(true).open(&path)?;
                    file.write_all_at(&bytes(offset, length), offset)
                }
                "write and hold" => {
                    let file = open().write(true).open(&path)?;
                    for stamp in &stamps {
                        file.write_all_at(&content(*stamp, offset, length as usize), offset)?;
                        thread::sleep(Duration::from_millis(hold / STORES));
                    }
                    Ok(())
                }
                "truncate down" => {
                    let file = open().write(true).open(&path)?;
                    file.set_len(size - length.min(size / 2))
                }
                "truncate up" => {
                    let file = open().write(true).open(&path)?;
                    file.set_len(size + length)?;
                    // Half of what was added stays zeros.
                    file.write_all_at(&bytes(size + length / 2, length / 2), size + length / 2)
                }
                "append" => {
                    let mut file = open().append(true).open(&path)?;
                    file.write_all(&bytes(size, length))
                }
                "rewrite" => fs::write(&path, bytes(0, new_size)),
                "rename over" => fs::rename(self.folder.join(&spare.name), &path),
                "rename away and back" => {
                    fs::rename(&path, &other)?;
                    self.pause(hold);
                    fs::rename(&other, &path)
                }
                "unlink and recreate" => {
                    match fs::remove_file(&path) {
                        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                        _ => {}
                    }
                    fs::write(&path, bytes(0, new_size))
                }
                "store and msync" | "store and hold" => {
                    let content = |stamp: &Stamp| content(*stamp, offset, length as usize);
                    let contents: Vec<_> = stamps.iter().map(content).collect();
                    let sync = kind == "store and msync";
                    mapper.store(&path, offset, &contents, sync, hold / STORES)
                }
                _ => unreachable!("{kind}"),
            })
    }

    /// Writes the clip that will be renamed over another, and often lets rclone
    /// upload it and cache it whole.
    fn fill_spare(&self, spare: &Clip, random: &mut Random) -> io::Result<()> {
        let stamp: Stamp = self.journal.stamp(spare.file);
        let size = random.between(SIZES.start, SIZES.end);
        let path = self.folder.join(&spare.name);
        fs::write(&path, content(stamp, 0, size as usize))?;
        self.pause(random.below(1_200));
        fs::read(&path).map(drop)
    }

    /// A place in a file for a write of at least four cells: of any alignment,
    /// or of whole pages; a small, hot one for what is written `often`.
    fn place(size: u64, often: bool, random: &mut Random) -> (u64, u64) {
        if often {
            let length = random.between(64, STORED);
            return (hot_place(size, random).min(size - length), length);
        }
        let most = *random.of(&[4 * KIB, 64 * KIB]);
        let length = random.between(64, most).min(size / 2).max(64);
        let end = (size - length.min(size - 1)).max(1);
        let offset = if random.one_in(3) {
            random.below(end)
        } else {
            hot_place(size, random).min(end - 1)
        };
        if random.one_in(3) {
            return (offset & !4_095, (length + 4_095) & !4_095);
        }
        (offset, length)
    }
}

/// Seconds since 1970.
pub fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn set_time(path: &std::path::Path, time: SystemTime) -> io::Result<()> {
    File::options().write(true).open(path)?.set_modified(time)
}

/// A Python program that stores into shared mappings: what goes wrong there is
/// a signal, which must not end the test.
#[derive(Default)]
struct Mapper {
    process: Option<(Child, ChildStdin, BufReader<ChildStdout>)>,
}

const MAPPER: &str = r#"
import json, mmap, os, sys, time
for line in sys.stdin:
    task = json.loads(line)
    try:
        fd = os.open(task["path"], os.O_RDWR)
        try:
            start = task["offset"]
            with mmap.mmap(fd, os.fstat(fd).st_size) as memory:
                for content in map(bytes.fromhex, task["contents"]):
                    memory[start:start + len(content)] = content
                    if task["sync"]:
                        memory.flush()
                    time.sleep(task["pause"] / 1000)
        finally:
            os.close(fd)
        print("done", flush=True)
    except Exception as error:
        print(error, flush=True)
"#;

impl Mapper {
    fn store(
        &mut self,
        path: &std::path::Path,
        offset: u64,
        contents: &[Vec<u8>],
        sync: bool,
        pause: u64,
    ) -> io::Result<()> {
        if self.process.is_none() {
            let mut child = Command::new("python3")
                .args(["-c", MAPPER])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            let input = child.stdin.take().unwrap();
            let output = BufReader::new(child.stdout.take().unwrap());
            self.process = Some((child, input, output));
        }
        let (_, input, output) = self.process.as_mut().unwrap();
        let contents: Vec<String> = contents.iter().map(|bytes| hex(bytes)).collect();
        let task = serde_json::json!({
            "path": path, "offset": offset, "contents": contents, "sync": sync, "pause": pause,
        });
        let mut answer = String::new();
        let told = writeln!(input, "{task}").and_then(|()| output.read_line(&mut answer));
        match (told, answer.trim()) {
            (Ok(_), "done") => Ok(()),
            (Ok(n), error) if n > 0 => Err(io::Error::other(error.to_owned())),
            // SIGBUS: the file was cut, or the daemon killed.
            _ => {
                self.end();
                Err(io::Error::other("the mapping's process died"))
            }
        }
    }

    fn end(&mut self) {
        if let Some((mut child, ..)) = self.process.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        self.end();
    }
}
