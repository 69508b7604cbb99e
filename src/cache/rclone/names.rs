//! File names whose name in the cache is known to be the one FUSE shows.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::reason::{Reason, Refusal};

/// Refuses names that rclone writes otherwise in its cache: it shows control
/// characters as U+2400..=U+2421 and quotes with U+201B, and keeps full-width
/// dot and slash for `.` and `/` (lib/encoder). Their bytes are read through FUSE.
///
/// # Errors
/// [`Reason::Unsupported`], naming the path.
pub(super) fn check(inside: &Path) -> Result<(), Refusal> {
    let special = String::from_utf8_lossy(inside.as_os_str().as_bytes())
        .chars()
        .find(|c| {
            matches!(
                c,
                '\u{2400}'..='\u{2421}' | '\u{201b}' | '\u{ff0e}' | '\u{ff0f}'
            )
        });
    match special {
        None => Ok(()),
        Some(c) => Err(Refusal::new(
            Reason::Unsupported,
            format!(
                "`{}`: rclone may name it otherwise in the cache, because of U+{:04X}",
                inside.display(),
                c as u32
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    #[test]
    fn plain_names_pass_and_encoded_ones_do_not() {
        for good in ["a b/c'\"\\:é日本", "e\u{301}", "a\nb"] {
            check(Path::new(good)).unwrap();
        }
        check(Path::new(OsStr::from_bytes(b"\xff\xfe"))).unwrap();
        for bad in [
            "new\u{240a}line",
            "\u{2421}",
            "q\u{201b}",
            "\u{ff0e}",
            "a/\u{ff0f}",
        ] {
            let refusal = check(Path::new(bad)).unwrap_err();
            assert_eq!(refusal.reason, Reason::Unsupported);
        }
    }
}
