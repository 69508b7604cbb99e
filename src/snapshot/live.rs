//! The cache file itself, while nobody else has it open.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::{Kept, SnapshotKind, Whole, reopen};
use crate::reader::{Shown, Vigil, WholeClip};
use crate::reason::{Reason, Refusal};
use crate::sys::is_open_to_write;

/// How long rclone may take to close a clip after we have.
const CLOSES_WITHIN: Duration = Duration::from_millis(100);
/// How often to look whether it has.
const INTERVAL: Duration = Duration::from_millis(2);
/// A proof that was had while rclone kept the clip open may be used so much
/// later, milliseconds: until it has closed it, from 1.74 on after 5 seconds.
const PROOF_LASTS_MS: u64 = 60_000;

/// Hands the cache file over. rclone has a clip open while anyone does, and
/// then writes a new version of it into the old file; so nobody may, which a
/// read lease tells that the kernel grants.
///
/// # Errors
/// [`Reason::Busy`] where somebody has; else why it is not proven.
pub(super) fn open(
    kept: &mut Option<Kept>,
    clip: BorrowedFd<'_>,
    shown: &Shown,
) -> Result<Whole, Refusal> {
    let usable = |kept: &Kept| kept.vigil.age_ms() < PROOF_LASTS_MS && kept.vigil.check().is_ok();
    let reused = kept.as_ref().is_some_and(usable);
    if !reused {
        // Closed at once, or the lease could never be had.
        let vigil = WholeClip::prove(clip, shown.clone())?.close();
        *kept = Some(Kept {
            vigil,
            object: None,
        });
    }
    let Some(Kept { vigil, .. }) = kept else {
        let detail = "no proof was kept";
        return Err(Refusal::new(Reason::IoError, detail));
    };
    let deadline = Instant::now()
        + if reused {
            Duration::ZERO
        } else {
            CLOSES_WITHIN
        };
    wait_until_closed(vigil, deadline)?;
    vigil.check()?;
    let fd = reopen(vigil.data())
        .map_err(|e| Refusal::from_io("opening the cache file anew", &e, Reason::IoError))?;
    let (size, modified) = vigil.version();
    Ok(Whole {
        fd,
        kind: SnapshotKind::Live,
        size,
        modified,
        reused,
    })
}

fn wait_until_closed(vigil: &Vigil, deadline: Instant) -> Result<(), Refusal> {
    loop {
        match is_open_to_write(vigil.data()) {
            Ok(false) => return Ok(()),
            Ok(true) if Instant::now() < deadline => std::thread::sleep(INTERVAL),
            Ok(true) => {
                let detail = "somebody has the clip open, or rclone still has its cache file open";
                return Err(Refusal::new(Reason::Busy, detail));
            }
            Err(e) => {
                let what = "a read lease on the cache file";
                return Err(Refusal::from_io(what, &e, Reason::Unsupported));
            }
        }
    }
}
