//! Which build this is.

use std::fmt;

/// The oldest kernel that this works on: `bpf_task_pt_regs()` came with it.
pub const KERNEL_FLOOR: (u32, u32) = (5, 15);

/// What a build is made of. As text: `0.1.0 (0123456789ab, libbpf 1.7, linux
/// 5.15 or newer)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Build {
    /// The package's version.
    pub version: &'static str,
    /// The git revision: `-dirty` at its end if the sources differed from it,
    /// `-dev` if that was not followed, as in unoptimised builds; `unknown`
    /// without git.
    pub revision: &'static str,
    /// The libbpf that is linked, major and minor; `None` without the tracker.
    pub libbpf: Option<(u32, u32)>,
}

/// This build.
#[must_use]
pub fn build() -> Build {
    Build {
        version: env!("CARGO_PKG_VERSION"),
        revision: env!("VMAFX_BYPASS_REVISION"),
        #[cfg(feature = "ebpf")]
        libbpf: Some(crate::tracker::libbpf_version()),
        #[cfg(not(feature = "ebpf"))]
        libbpf: None,
    }
}

impl fmt::Display for Build {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, ", self.version, self.revision)?;
        match self.libbpf {
            Some((major, minor)) => write!(f, "libbpf {major}.{minor}, ")?,
            None => f.write_str("no tracker, ")?,
        }
        let (major, minor) = KERNEL_FLOOR;
        write!(f, "linux {major}.{minor} or newer)")
    }
}
