//! Why a file is bypassed, or not: every gate with its evidence.

use std::io;
use std::path::{Path, PathBuf};

use super::companion::Companion;
use super::options::BypassOptions;
use super::remote::Via;
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
    /// The gates that were come to. All of the pure ones are there, also after one
    /// that does not hold; none but the server's where that was asked first and has
    /// proven the clip.
    pub steps: Vec<Step>,
    /// Why all goes through FUSE; `None` where ranges come from the cache.
    pub refusal: Option<Refusal>,
    /// The whole file in ranges: from the cache (`None`), or through FUSE and why.
    pub ranges: Vec<(Span, Option<Reason>)>,
}

impl Explanation {
    /// Explains a file, as a read that began now with the default options would
    /// find it; see [`BypassOptions::explain`].
    ///
    /// # Errors
    /// Those of open(2) on the path itself.
    pub fn of(path: impl AsRef<Path>) -> io::Result<Self> {
        BypassOptions::new().explain(path)
    }

    pub(super) fn by(via: &Via, path: &Path) -> io::Result<Self> {
        let companion = Companion::open(path)?;
        let mut trail = Trail::on();
        let enabled = match optin::from_env() {
            OptIn::Killed => Err(Refusal::new(
                Reason::Disabled,
                format!("{}=0", optin::VARIABLE),
            )),
            _ => Ok(format!("{} is not 0", optin::VARIABLE)),
        };
        let enabled = trail.note(Gate::Enabled, enabled);
        // Switched off, no read asks a server.
        let via = enabled.as_ref().map_or(Via::default(), |()| via.clone());
        let mapped = via.prove(&companion, None, &mut trail);
        let mapped = mapped.and_then(|epoch| epoch.map());
        if mapped.is_ok() {
            // Unless it was asked, and has noted so itself.
            let _ = trail.note(Gate::Handover, Ok("not needed: no server was asked".into()));
        }
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
