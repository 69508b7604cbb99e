//! Reads clips that rclone has cached past FUSE, never at the price of a wrong
//! byte, and tracks with eBPF which clips programs have open.
//!
//! - [`BypassFile`] is a file on an rclone mount that reads from rclone's disk
//!   cache, range by range, where the bytes are proven present and current,
//!   and through FUSE where they are not.
#![cfg_attr(
    feature = "ebpf",
    doc = "- [`Tracker`] knows which descriptors on a mount are open, host-wide, from\n  tracepoints."
)]
//! - [`AlignedBuffer`] is where to read them to.
//! - [`handover`] gives cache files to processes that may not open them.
//! - [`snapshot`] hands whole clips over, as descriptors whose bytes never change.
//! - [`mod@bench`] compares the ways to read a clip.
//! - [`exec`] runs unmodified programs, and answers their opens of clips.
//! - [`warm`] completes clips in the cache.
#![cfg_attr(
    feature = "mount",
    doc = "- [`reexport`] shows an rclone mount again, for programs that nobody changes."
)]
#![cfg_attr(feature = "metrics", doc = "- [`metrics`] serves counts over HTTP.")]
//!
//! "pid" is always the kernel's tgid: what getpid(2) returns.

mod aligned;
pub mod bench;
pub mod cache;
mod clips;
pub mod exec;
pub mod handover;
mod histogram;
#[cfg(feature = "metrics")]
pub mod metrics;
pub mod mounts;
pub mod optin;
pub mod privileges;
pub mod reader;
pub mod reason;
#[cfg(feature = "mount")]
pub mod reexport;
pub mod rig;
pub mod snapshot;
mod sys;
#[cfg(feature = "ebpf")]
pub mod tracker;
pub mod version;
pub mod warm;

pub use aligned::AlignedBuffer;
pub use clips::Clips;
pub use reader::{BypassFile, BypassOptions, Explanation, ReadStats, Verify};
pub use reason::{Reason, Refusal};
#[cfg(feature = "ebpf")]
pub use tracker::{Tracker, TrackerOptions};
