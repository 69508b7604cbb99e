//! Why a file is bypassed, or not: every gate with its evidence.

use std::io;
use std::path::{Path, PathBuf};

use super::companion::Companion;
use super::prove::{Wanted, prove};
use crate::cache::ranges::Span;
use crate::cache::trail::{Gate, Step, Trail};
use crate::optin::{self, OptIn};
use crate::reason::{Reason, Refusal};

/// What a read of a file would do, and why.
#[derive(Debug, Clone)]
pub struct Explanation {
    /// The file's absolute path, without symlinks.
    pub path: PathBuf,
    /// Its size as FUSE shows it, bytes.
    pub size: u64,
    /// The gates that were come to, in order. All of the pure ones are there,
    /// also after one that does not hold.
    pub steps: Vec<Step>,
    /// Why all goes through FUSE; `None` where ranges come from the cache.
    pub refusal: Option<Refusal>,
    /// The whole file in ranges: from the cache (`None`), or through FUSE and why.
    pub ranges: Vec<(Span, Option<Reason>)>,
}

impl Explanation {
    /// Explains a file, as a read that began now would find it.
    ///
    /// It opens the file through FUSE and, where something of it is cached,
    /// reads one byte there, as every proof does; rclone then keeps the clip as
    /// recently used. It changes nothing else.
    ///
    /// # Errors
    /// Those of open(2) on the path itself.
    pub fn of(path: impl AsRef<Path>) -> io::Result<Self> {
        let companion = Companion::open(path.as_ref())?;
        let mut trail = Trail::on();
        let enabled = match optin::from_env() {
            OptIn::Killed => Err(Refusal::new(
                Reason::Disabled,
                format!("{}=0", optin::VARIABLE),
            )),
            _ => Ok(format!("{} is not 0", optin::VARIABLE)),
        };
        let enabled = trail.note(Gate::Enabled, enabled);
        let mapped =
            prove(&companion, None, Wanted::Ranges, &mut trail).and_then(|epoch| epoch.map());
        let size = companion.metadata()?.len();
        let (refusal, ranges) = match enabled.and(mapped) {
            Ok(map) => (None, map),
            Err(refusal) => {
                let whole = Span {
                    start: 0,
                    end: size,
                };
                let ranges = (size > 0).then_some((whole, Some(refusal.reason)));
                (Some(refusal), ranges.into_iter().collect())
            }
        };
        Ok(Self {
            path: companion.path().to_path_buf(),
            size,
            steps: trail.into_steps(),
            refusal,
            ranges,
        })
    }

    /// Bytes that would come from the cache.
    #[must_use]
    pub fn cached_bytes(&self) -> u64 {
        let cached = self.ranges.iter().filter(|(_, reason)| reason.is_none());
        cached.map(|(span, _)| span.end - span.start).sum()
    }
}
