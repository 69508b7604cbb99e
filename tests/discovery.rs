//! Every kind of rclone mount whose cache is found: its clips are bypassed, and
//! the bytes are right. Each test runs on every rclone program there is.
#![allow(clippy::unwrap_used)]

mod common;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::clips::*;
use common::{content, need_root, put, rclones, rig_with};
use vmafx_bypass::BypassFile;
use vmafx_bypass::rig::{Rig, RigOptions};

const SIZE: usize = 300_000;

/// What a row mounts, and with what settings.
#[derive(Default)]
struct Row<'a> {
    remote: Option<&'a str>,
    command: Option<&'a str>,
    arguments: &'a [&'a str],
    environment: &'a [(&'a str, &'a str)],
    no_cache_argument: bool,
    /// The clip's path inside the mount, if it is not `clip`.
    clip: Option<&'a str>,
    /// Where its data file must be, below the rig's folder.
    data: Option<&'a str>,
}

impl Row<'_> {
    fn options(&self, rclone: &Path) -> RigOptions {
        let defaults = options(rclone, self.arguments);
        RigOptions {
            remote: self.remote.map(str::to_owned),
            command: self.command.unwrap_or("mount").to_owned(),
            environment: owned(self.environment),
            cache_argument: !self.no_cache_argument,
            ..defaults
        }
    }

    /// Mounts a folder of two clips, on each rclone, and reads this row's.
    fn is_bypassed(&self) {
        need_root();
        for rclone in rclones() {
            let rig = rig_with(self.options(&rclone), two_clips);
            let clip = self.clip.unwrap_or(CLIP);
            bypassed(&rig, Path::new(clip), &content(1, SIZE));
            if let Some(data) = self.data {
                let folder = rig.folder().to_str().unwrap();
                let data = data.replace("{folder}", &folder[1..]);
                let stat = fs::metadata(rig.folder().join(&data));
                assert_eq!(stat.expect(&data).len(), SIZE as u64);
            }
        }
    }
}

fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    let pairs = pairs.iter();
    pairs.map(|(n, v)| (n.to_string(), v.to_string())).collect()
}

/// `clip` and `sub/clip`, alike.
fn two_clips(source: &Path) {
    put(source, CLIP, &content(1, SIZE));
    put(source, "sub/clip", &content(1, SIZE));
}

/// Caches a clip; all of it then comes from the cache, and is right.
fn bypassed(rig: &Rig, inside: &Path, bytes: &[u8]) {
    rig.cache_whole(inside)
        .unwrap_or_else(|e| panic!("{}: {e}", inside.display()));
    let file = BypassFile::open(rig.mountpoint().join(inside)).unwrap();
    assert_eq!(file.refusal(), None);
    assert!(read_all(&file) == bytes);
    assert_eq!(file.stats().cache_bytes, bytes.len() as u64);
}

/// A remote `loc:` of the local backend.
const LOC: &[(&str, &str)] = &[("RCLONE_CONFIG_LOC_TYPE", "local")];

#[test]
fn a_remote_of_the_config_is_bypassed() {
    Row {
        remote: Some("loc:{folder}/source"),
        environment: LOC,
        data: Some("cache/vfs/loc/{folder}/source/clip"),
        ..Row::default()
    }
    .is_bypassed();
}

#[test]
fn a_sub_folder_of_a_remote_is_bypassed() {
    Row {
        remote: Some("loc:{folder}/source/sub/"),
        environment: LOC,
        data: Some("cache/vfs/loc/{folder}/source/sub/clip"),
        ..Row::default()
    }
    .is_bypassed();
}

#[test]
fn remotes_on_the_fly_are_bypassed() {
    // Over HTTP, with a connection string.
    Row::default().is_bypassed();
    Row {
        remote: Some(":local:{folder}/source"),
        data: Some("cache/vfs/:local/{folder}/source/clip"),
        ..Row::default()
    }
    .is_bypassed();
}

#[test]
fn overridden_remotes_are_bypassed() {
    let remote = Some("loc:{folder}/source");
    Row {
        remote: Some("loc,no_check_updated=true:{folder}/source"),
        environment: LOC,
        ..Row::default()
    }
    .is_bypassed();
    Row {
        remote,
        arguments: &["--local-no-check-updated"],
        environment: LOC,
        ..Row::default()
    }
    .is_bypassed();
    Row {
        remote,
        environment: &[LOC[0], ("RCLONE_LOCAL_NO_CHECK_UPDATED", "true")],
        ..Row::default()
    }
    .is_bypassed();
}

#[test]
fn an_alias_is_bypassed() {
    for (target, data) in [
        (
            "{folder}/source",
            "cache/vfs/local/{folder}/source/sub/clip",
        ),
        (
            "loc:{folder}/source",
            "cache/vfs/loc/{folder}/source/sub/clip",
        ),
    ] {
        Row {
            remote: Some("al:sub"),
            environment: &[
                LOC[0],
                ("RCLONE_CONFIG_AL_TYPE", "alias"),
                ("RCLONE_CONFIG_AL_REMOTE", target),
            ],
            data: Some(data),
            ..Row::default()
        }
        .is_bypassed();
    }
}

#[test]
fn union_and_combine_are_bypassed() {
    Row {
        remote: Some("un:"),
        environment: &[
            ("RCLONE_CONFIG_UN_TYPE", "union"),
            (
                "RCLONE_CONFIG_UN_UPSTREAMS",
                "{folder}/source {folder}/source/sub:ro",
            ),
        ],
        ..Row::default()
    }
    .is_bypassed();
    Row {
        remote: Some("co:"),
        environment: &[
            ("RCLONE_CONFIG_CO_TYPE", "combine"),
            ("RCLONE_CONFIG_CO_UPSTREAMS", "dir={folder}/source"),
        ],
        clip: Some("dir/sub/clip"),
        ..Row::default()
    }
    .is_bypassed();
}

#[test]
fn crypt_is_bypassed() {
    need_root();
    for rclone in rclones() {
        let password = Command::new(&rclone).args(["obscure", "secret"]).output();
        let password = String::from_utf8(password.unwrap().stdout).unwrap();
        let row = Row {
            remote: Some("cr:"),
            environment: &[
                ("RCLONE_CONFIG_CR_TYPE", "crypt"),
                ("RCLONE_CONFIG_CR_REMOTE", "{folder}/source"),
                ("RCLONE_CONFIG_CR_PASSWORD", password.trim()),
            ],
            ..Row::default()
        };
        let rig = rig_with(row.options(&rclone), |source| {
            let plain = tempfile::tempdir().unwrap();
            two_clips(plain.path());
            let mut copy = Command::new(&rclone);
            for (name, value) in row.environment {
                let folder = source.parent().unwrap().to_str().unwrap();
                copy.env(name, value.replace("{folder}", folder));
            }
            copy.args(["--config=", "copy"])
                .arg(plain.path())
                .arg("cr:");
            assert!(copy.status().unwrap().success());
            assert!(!source.join(CLIP).exists(), "names are encrypted");
        });
        bypassed(&rig, Path::new("sub/clip"), &content(1, SIZE));
    }
}

#[test]
fn local_paths_are_bypassed() {
    Row {
        remote: Some("{folder}/source"),
        data: Some("cache/vfs/local/{folder}/source/clip"),
        ..Row::default()
    }
    .is_bypassed();
    for remote in ["./source/sub", "source/sub/", "./source/../source/sub"] {
        Row {
            remote: Some(remote),
            ..Row::default()
        }
        .is_bypassed();
    }
}

#[test]
fn mount2_is_bypassed() {
    Row {
        command: Some("mount2"),
        ..Row::default()
    }
    .is_bypassed();
}

#[test]
fn the_cache_folder_is_found_wherever_it_is() {
    for (arguments, environment, data) in [
        (&["--cache-dir", "./x/../y"][..], &[][..], "y/vfs"),
        (&[], &[("RCLONE_CACHE_DIR", "{folder}/y")], "y/vfs"),
        (&[], &[("RCLONE_CACHE_DIR", "y")], "y/vfs"),
        (&[], &[("XDG_CACHE_HOME", "{folder}/y")], "y/rclone/vfs"),
        (
            &[],
            &[("XDG_CACHE_HOME", ""), ("HOME", "{folder}/y")],
            "y/.cache/rclone/vfs",
        ),
    ] {
        Row {
            remote: Some(":local:{folder}/source"),
            arguments,
            environment,
            no_cache_argument: true,
            data: Some(&format!("{data}/:local/{{folder}}/source/clip")),
            ..Row::default()
        }
        .is_bypassed();
    }
}

#[test]
fn encoded_names_are_bypassed() {
    need_root();
    // On disk, in FUSE, and in the cache.
    let names: &[(&[u8], &str, &[u8])] = &[
        (b"new\nline", "new␊line", b"new\nline"),
        (b"\x7f", "␡", b"\x7f"),
        ("␁".as_bytes(), "‛␁", "␁".as_bytes()),
        ("␀".as_bytes(), "␀", "␀".as_bytes()),
        ("．".as_bytes(), "．", "．".as_bytes()),
        ("．．".as_bytes(), "．．", "．．".as_bytes()),
        ("a／b".as_bytes(), "a／b", "a／b".as_bytes()),
        ("q‛‛".as_bytes(), "q‛‛", "q‛‛".as_bytes()),
        (b"d\x01r/cl\tip", "d␁r/cl␉ip", b"d\x01r/cl\tip"),
        (
            "it's \"a\\b:c\" e\u{301}é日本".as_bytes(),
            "it's \"a\\b:c\" e\u{301}é日本",
            "it's \"a\\b:c\" e\u{301}é日本".as_bytes(),
        ),
    ];
    let invalid: &[u8] = b"x\xff\xfe";
    for rclone in rclones() {
        let row = Row {
            remote: Some("{folder}/source/ro␊ot"),
            ..Row::default()
        };
        let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
        let rig = rig_with(row.options(&rclone), |source| {
            let root = source.join("ro\not");
            for (seed, (disk, _, _)) in names.iter().enumerate() {
                let file = root.join(path(disk));
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, content(seed as u32, SIZE)).unwrap();
            }
            fs::write(root.join(path(invalid)), content(99, SIZE)).unwrap();
        });
        let folder = rig.folder().strip_prefix("/").unwrap();
        let cache = rig
            .cache()
            .join("vfs/local")
            .join(folder)
            .join("source/ro\not");
        for (seed, (_, shown, cached)) in names.iter().enumerate() {
            bypassed(&rig, Path::new(shown), &content(seed as u32, SIZE));
            assert!(cache.join(path(cached)).exists(), "{shown}");
        }
        bypassed(&rig, &path(invalid), &content(99, SIZE));
    }
}
