//! The opt-in by environment: one variable for a host, or for a fleet.

use std::env;
use std::ffi::OsStr;

/// `1` opts in, `0` turns every bypass off, unset leaves it to the command.
pub const VARIABLE: &str = "VMAFX_EBPF_BYPASS";

/// What [`VARIABLE`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptIn {
    /// `1`: `run` may start.
    Yes,
    /// `0`: the fleet's kill switch; everything goes through FUSE.
    Killed,
    /// Unset, empty, or anything else.
    Unset,
}

/// Reads [`VARIABLE`].
#[must_use]
pub fn from_env() -> OptIn {
    parse(env::var_os(VARIABLE).as_deref())
}

fn parse(value: Option<&OsStr>) -> OptIn {
    match value.and_then(OsStr::to_str) {
        Some("1") => OptIn::Yes,
        Some("0") => OptIn::Killed,
        _ => OptIn::Unset,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_and_zero_count() {
        let parse = |s: &str| parse(Some(OsStr::new(s)));
        assert_eq!(parse("1"), OptIn::Yes);
        assert_eq!(parse("0"), OptIn::Killed);
        for other in ["", "true", "01", " 1"] {
            assert_eq!(parse(other), OptIn::Unset);
        }
    }
}
