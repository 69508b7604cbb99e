//! Clips that are made for the purpose.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use vmafx_bypass::bench::Tuned;
use vmafx_bypass::rig::{Rig, RigOptions};

use crate::exit::{Coded, Exit};
use crate::output::Notes;
use crate::signals::Interrupted;

/// The generated clip's name.
const CLIP: &str = "clip.y4m";
/// What a mount is tuned by, for clips that are read in order and do not change.
const TUNED: [&str; 5] = [
    "--max-read-ahead=1Mi",
    "--attr-timeout=1h",
    "--dir-cache-time=1h",
    "--vfs-fast-fingerprint",
    "--use-mmap",
];

/// A clip on a mount as rclone makes it by default, and perhaps on a tuned one.
pub struct Rigs {
    // Ended first: the other serves it.
    tuned: Option<Rig>,
    rig: Rig,
}

impl Rigs {
    pub fn clip(&self) -> PathBuf {
        self.rig.mountpoint().join(CLIP)
    }

    pub fn tuned(&self) -> Option<Tuned> {
        let tuned = self.tuned.as_ref()?;
        Some(Tuned {
            prefix: self.rig.mountpoint(),
            folder: tuned.mountpoint(),
        })
    }
}

/// Serves, mounts and caches a clip of random bytes; `None` when interrupted. `tuned`:
/// on a tuned mount, too, and whether it may be left out where that fails.
pub fn rigs(
    rclone: &Path,
    size: u64,
    tuned: Option<bool>,
    notes: &Notes,
    interrupted: &Interrupted,
) -> Result<Option<Rigs>> {
    let stop = || interrupted.exit().is_some();
    let options = RigOptions {
        rclone: PathBuf::from(rclone),
        ..RigOptions::default()
    };
    let cached = |rig: Rig| {
        rig.cache_whole_unless(Path::new(CLIP), stop)
            .context("caching the generated clip")?;
        Ok(rig)
    };
    let environment = |e: io::Error| Coded::error(Exit::Environment, e.to_string());
    let made = Rig::start(options.clone(), |source| fill(source, size, &stop))
        .map_err(environment)
        .and_then(cached)
        .and_then(|rig| {
            let start = || {
                let options = RigOptions {
                    remote: Some(rig.remote().to_owned()),
                    mount_arguments: TUNED.map(str::to_owned).to_vec(),
                    ..options
                };
                Rig::start(options, |_| Ok(()))
                    .map_err(environment)
                    .and_then(cached)
            };
            let Some(may_be_left_out) = tuned else {
                return Ok(Rigs { tuned: None, rig });
            };
            let tuned = match start() {
                Ok(tuned) => Some(tuned),
                Err(error) if may_be_left_out && !stop() => {
                    notes.note(format_args!("note: no tuned mount: {error:#}"));
                    None
                }
                Err(error) => return Err(error),
            };
            if let Some(Err(error)) = tuned.as_ref().map(|rig| rig.set_read_ahead(1024)) {
                notes.note(format_args!(
                    "note: the tuned mount reads ahead no further than others: {error}"
                ));
            }
            Ok(Rigs { tuned, rig })
        });
    match made {
        Err(_) if stop() => Ok(None),
        made => made.map(Some),
    }
}

/// Writes the clip where it is served.
fn fill(source: &Path, size: u64, stop: &dyn Fn() -> bool) -> io::Result<()> {
    let mut clip = BufWriter::new(File::create(source.join(CLIP))?);
    let mut random = File::open("/dev/urandom")?;
    let mut left = size;
    while left > 0 {
        if stop() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let part = left.min(16 << 20);
        io::copy(&mut Read::by_ref(&mut random).take(part), &mut clip)?;
        left -= part;
    }
    clip.flush()
}
