//! The name of a clip in the cache, from the name that FUSE shows.
//!
//! rclone shows names in its Standard encoding, in which control characters
//! are symbols (`␊`), and keeps its cache in the Base encoding, in which they
//! are themselves: each component is `Base.Encode(Standard.Decode(name))`
//! (lib/encoder/encoder.go `FromStandardName`, standard.go, os_other.go, called
//! by vfs/vfscache/cache.go `toOSPath`; the same in 1.60.1 and 1.75.0).

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use crate::reason::{Reason, Refusal};

const QUOTE: &[u8] = "‛".as_bytes();
const NULL: &[u8] = "␀".as_bytes();
const DELETE: &[u8] = "␡".as_bytes();
const SLASH: &[u8] = "／".as_bytes();
const DOT: &[u8] = "．".as_bytes();
const DOT_DOT: &[u8] = "．．".as_bytes();
const QUOTED_DOT: &[u8] = "‛．".as_bytes();
const QUOTED_DOT_DOT: &[u8] = "‛．‛．".as_bytes();
/// What `␀` and the symbols for 0x01 to 0x1f share, before their last byte.
const SYMBOLS: &[u8] = &[0xe2, 0x90];

/// Which characters an encoding replaces, beyond those that each does.
#[derive(Clone, Copy)]
enum Encoding {
    /// None.
    Base,
    /// Control characters and DEL.
    Standard,
}

/// The path below the remote's folder in the cache of a path in Standard
/// encoding. What has no certain name, [`check`] refuses.
pub(super) fn in_cache(path: &Path) -> PathBuf {
    path.iter()
        .map(|name| {
            let raw = decode(name.as_bytes());
            OsString::from_vec(encode(&raw, Encoding::Base))
        })
        .collect()
}

/// Refuses paths that are not as rclone writes them: without an encoding of
/// their own some backends show names as they are, and then two of them may
/// share one file in the cache (a newline and `␊`). And `..`, which rclone's
/// versions resolve differently.
///
/// # Errors
/// [`Reason::Unsupported`], naming the path.
pub(super) fn check(path: &Path) -> Result<(), Refusal> {
    let is_standard = path.components().all(|component| match component {
        Component::Normal(name) => {
            encode(&decode(name.as_bytes()), Encoding::Standard) == name.as_bytes()
        }
        _ => false,
    });
    if is_standard {
        return Ok(());
    }
    Err(Refusal::new(
        Reason::Unsupported,
        format!(
            "`{}`: not in rclone's encoding of names; its name in the cache is uncertain",
            path.display()
        ),
    ))
}

/// Refuses a path that rclone may have found under another name: what is not
/// there byte for byte it looks up again by its Unicode normal form (vfs/dir.go
/// `stat`, since 1.66 or so), and keeps under the name that the folder lists.
/// `path` is where FUSE shows `inside`.
///
/// # Errors
/// [`Reason::Unsupported`], naming the path, and those of listing the folder.
pub(super) fn check_listed(path: &Path, inside: &Path) -> Result<(), Refusal> {
    let mut shown = path.ancestors();
    for name in inside.iter().rev() {
        let at = shown.next().filter(|at| at.file_name() == Some(name));
        if name.is_ascii() {
            continue;
        }
        // Above a bind mount nothing can be listed.
        let listed = match at.and_then(Path::parent).map(fs::read_dir) {
            Some(Ok(entries)) => entries.flatten().any(|entry| entry.file_name() == name),
            Some(Err(e)) => {
                let what = format_args!("folder of `{}`", path.display());
                return Err(Refusal::from_io(what, &e, Reason::IoError));
            }
            None => false,
        };
        if !listed {
            return Err(Refusal::new(
                Reason::Unsupported,
                format!(
                    "`{}`: `{}` is not listed so; rclone may know it by another name",
                    path.display(),
                    name.display()
                ),
            ));
        }
    }
    Ok(())
}

/// The value of a symbol for a control character, DEL or slash at the start,
/// with its length in bytes. Such a symbol starts with a byte that is in no
/// other character, so that bytes which are no UTF-8 around it do not matter.
fn symbol(name: &[u8]) -> Option<(u8, usize)> {
    if name.starts_with(SLASH) {
        return Some((b'/', SLASH.len()));
    }
    if name.starts_with(DELETE) {
        return Some((0x7f, DELETE.len()));
    }
    let last = *name.strip_prefix(SYMBOLS)?.first()?;
    (0x80..=0x9f).contains(&last).then(|| (last - 0x80, 3))
}

/// `Standard.Decode`.
fn decode(name: &[u8]) -> Vec<u8> {
    match name {
        DOT => return b".".to_vec(),
        DOT_DOT => return b"..".to_vec(),
        QUOTED_DOT => return DOT.to_vec(),
        QUOTED_DOT_DOT => return DOT_DOT.to_vec(),
        _ => {}
    }
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, tail)) = rest.split_first() {
        let quoted = rest.strip_prefix(QUOTE);
        if let Some((value, length)) = symbol(rest) {
            out.push(value);
            rest = &rest[length..];
        } else if let Some((_, length)) = quoted.and_then(symbol) {
            let end = QUOTE.len() + length;
            out.extend_from_slice(&rest[QUOTE.len()..end]);
            rest = &rest[end..];
        } else if let Some(after) = quoted {
            // One of two quotes; or one that quotes nothing, which stays.
            out.extend_from_slice(QUOTE);
            rest = after.strip_prefix(QUOTE).unwrap_or(after);
        } else {
            out.push(first);
            rest = tail;
        }
    }
    out
}

/// `Base.Encode` or `Standard.Encode`.
fn encode(raw: &[u8], encoding: Encoding) -> Vec<u8> {
    match raw {
        b"." => return DOT.to_vec(),
        b".." => return DOT_DOT.to_vec(),
        DOT => return QUOTED_DOT.to_vec(),
        DOT_DOT => return QUOTED_DOT_DOT.to_vec(),
        _ => {}
    }
    // Zero and slash can be in no file's name.
    let replaced = |value: u8| match encoding {
        Encoding::Base => matches!(value, 0 | b'/'),
        Encoding::Standard => matches!(value, 0..=0x1f | 0x7f | b'/'),
    };
    let mut out = Vec::with_capacity(raw.len());
    let mut rest = raw;
    while let Some((&first, tail)) = rest.split_first() {
        let special = symbol(rest).filter(|&(value, _)| replaced(value));
        let quote = rest.starts_with(QUOTE).then_some(QUOTE.len());
        if let Some(length) = special.map(|(_, length)| length).or(quote) {
            out.extend_from_slice(QUOTE);
            out.extend_from_slice(&rest[..length]);
            rest = &rest[length..];
            continue;
        }
        match first {
            b'/' => out.extend_from_slice(SLASH),
            0x7f if replaced(first) => out.extend_from_slice(DELETE),
            control if replaced(control) => {
                out.extend_from_slice(&NULL[..2]);
                out.push(NULL[2] + control);
            }
            other => out.push(other),
        }
        rest = tail;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::ffi::OsStr;

    /// Names as FUSE shows them, and as they are in the cache. From rclone's
    /// lib/encoder tests (encoder_test.go `TestEncodeDot`, `TestDecodeHalf`,
    /// `TestEncodeInvalidUnicode`, and encoder_cases_test.go for the masks of
    /// Standard), and from what 1.60.1 and 1.75.2 wrote.
    const NAMES: &[(&[u8], &[u8])] = &[
        (b"abc 123", b"abc 123"),
        ("a b'\"\\:é日本".as_bytes(), "a b'\"\\:é日本".as_bytes()),
        ("e\u{301}".as_bytes(), "e\u{301}".as_bytes()),
        (b"a\xbf\xfeb", b"a\xbf\xfeb"),
        (b"a\xbf\xce\xbe\xfeb", b"a\xbf\xce\xbe\xfeb"),
        (b"\xf0\xe2\x90\x8a", b"\xf0\n"),
        (b"\xe2\x90", b"\xe2\x90"),
        ("␁".as_bytes(), b"\x01"),
        ("a␊b␟".as_bytes(), b"a\nb\x1f"),
        ("␡".as_bytes(), b"\x7f"),
        // A space is no control character, and its symbol stands for itself.
        ("␠".as_bytes(), "␠".as_bytes()),
        ("‛␁".as_bytes(), "␁".as_bytes()),
        ("‛␡".as_bytes(), "␡".as_bytes()),
        // These two Base encodes as well.
        ("␀".as_bytes(), "␀".as_bytes()),
        ("‛␀".as_bytes(), "‛␀".as_bytes()),
        ("／".as_bytes(), "／".as_bytes()),
        ("a‛／b".as_bytes(), "a‛／b".as_bytes()),
        ("‛‛".as_bytes(), "‛‛".as_bytes()),
        ("‛‛␁".as_bytes(), "‛‛\u{1}".as_bytes()),
        ("．".as_bytes(), "．".as_bytes()),
        ("．．".as_bytes(), "．．".as_bytes()),
        ("‛．".as_bytes(), "‛．".as_bytes()),
        ("‛．‛．".as_bytes(), "‛．‛．".as_bytes()),
        ("．．．".as_bytes(), "．．．".as_bytes()),
        ("．a".as_bytes(), "．a".as_bytes()),
        (b"...", b"..."),
        (b". .", b". ."),
    ];

    fn path(bytes: &[u8]) -> &Path {
        Path::new(OsStr::from_bytes(bytes))
    }

    #[test]
    fn names_in_the_cache_are_rclones() {
        for &(shown, cached) in NAMES {
            check(path(shown)).unwrap();
            assert_eq!(in_cache(path(shown)), path(cached));
            let (shown, cached) = ([b"x/", shown].concat(), [b"x/", cached].concat());
            assert_eq!(in_cache(path(&shown)), path(&cached));
        }
        assert_eq!(in_cache(Path::new("")), Path::new(""));
    }

    #[test]
    fn names_that_rclone_would_not_write_are_refused() {
        for bad in [
            "a\nb",
            "\u{7f}",
            "‛",
            "‛a",
            "a‛",
            "‛．．",
            "．‛．",
            "a‛．",
            "../x",
            "x/../y",
        ] {
            let refusal = check(Path::new(bad)).unwrap_err();
            assert_eq!(refusal.reason, Reason::Unsupported, "{bad:?}");
        }
    }

    #[test]
    fn a_name_must_be_listed_as_it_was_asked_for() {
        let (composed, decomposed) = ("\u{e9}", "e\u{301}");
        let folder = tempfile::tempdir().unwrap();
        let clip = folder.path().join(composed).join("clip");
        fs::create_dir(clip.parent().unwrap()).unwrap();
        fs::write(&clip, "").unwrap();
        let inside = Path::new("deep").join(composed).join("clip");
        check_listed(&clip, inside.strip_prefix("deep").unwrap()).unwrap();
        check_listed(&clip, &inside).unwrap();
        let other = Path::new(decomposed).join("clip");
        let shown = folder.path().join(&other);
        let refusal = check_listed(&shown, &other).unwrap_err();
        assert_eq!(refusal.reason, Reason::Unsupported);
        // Bound from within a folder whose own name is not in sight.
        let refusal = check_listed(&folder.path().join("clip"), &other).unwrap_err();
        assert_eq!(refusal.reason, Reason::Unsupported);
    }

    /// `Encode` and `Decode` as rclone's tests have them (`DecodeHalf`).
    #[test]
    fn a_lone_quote_stays() {
        assert_eq!(decode("‛a‛".as_bytes()), "‛a‛".as_bytes());
        assert_eq!(decode("‛‛".as_bytes()), "‛".as_bytes());
        assert_eq!(decode("a‛B‛Eg".as_bytes()), "a‛B‛Eg".as_bytes());
    }

    /// Every name of up to four of the characters that matter.
    fn every_name() -> Vec<Vec<u8>> {
        let parts = [
            "‛", "␀", "␁", "␡", "／", "．", "\0", "\u{1}", "\u{7f}", "/", ".", "a",
        ];
        let mut names = vec![Vec::new()];
        let mut last = names.clone();
        for _ in 0..4 {
            last = last
                .iter()
                .flat_map(|name| parts.map(|part| [name, part.as_bytes()].concat()))
                .collect();
            names.extend_from_slice(&last);
        }
        names
    }

    #[test]
    fn no_two_names_share_a_file() {
        let names = every_name();
        let shown: BTreeSet<_> = names
            .iter()
            .map(|n| encode(n, Encoding::Standard))
            .collect();
        assert_eq!(shown.len(), names.len());
        let cached: BTreeSet<_> = shown.iter().map(|n| in_cache(path(n))).collect();
        assert_eq!(cached.len(), names.len());
        // Nor does any other name that passes.
        for name in names
            .iter()
            .filter(|n| !n.contains(&b'/') && !n.contains(&0))
        {
            let name = path(name);
            let is_shown = shown.contains(name.as_os_str().as_bytes());
            let is_dots = matches!(name.to_str(), Some("." | ".."));
            assert!(check(name).is_err() || is_shown && !is_dots, "{name:?}");
        }
    }

    proptest! {
        /// Whatever a file is called, rclone's name for it leads back to it.
        #[test]
        fn encoding_is_undone(
            parts in prop::collection::vec(
                prop_oneof![
                    prop::sample::select(vec!["‛", "␀", "␟", "␠", "␡", "／", "．", "é"])
                        .prop_map(|s| s.as_bytes().to_vec()),
                    any::<u8>().prop_map(|b| vec![b]),
                ],
                1..12,
            )
        ) {
            let raw = parts.concat();
            let shown = encode(&raw, Encoding::Standard);
            prop_assert_eq!(&decode(&shown), &raw);
            prop_assert!(!shown.iter().any(|&b| b < 0x20 || b == 0x7f || b == b'/'));
            check(path(&shown)).unwrap();
            let cached = encode(&raw, Encoding::Base);
            prop_assert_eq!(in_cache(path(&shown)), path(&cached));
        }
    }
}
