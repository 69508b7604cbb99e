//! Mounts that could be taken for another: hidden remotes, several mounts on one
//! cache, other namespaces. A clip is never tied to the cache file of another of
//! its name, size and time.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use common::alike::*;
use common::clips::*;
use common::{content, eventually, rig_with};
use vmafx_bypass::Reason;
use vmafx_bypass::rig::Rig;

#[test]
fn a_remote_hidden_by_devname_is_bypassed() {
    each(|rclone| {
        for (name, arguments) in [
            ("loc:{folder}/source", &["--devname", "X"][..]),
            (
                "loc:{folder}/source",
                &["--devname=web:", "--local-no-check-updated"],
            ),
            (
                "loc,no_check_updated=true:{folder}/source",
                &["--devname=X"],
            ),
            ("{folder}/source", &["--devname=/elsewhere"]),
            ("./source/", &["--devname=X"]),
            (":local:{folder}/source", &["--devname=X"]),
        ] {
            let rig = rig_with(remote(rclone, name, arguments), |s| put_alike(s, CLIP, 1));
            becomes_bypassed(&clip(&rig), 1);
        }
        let http = options(rclone, &["--devname=X"]);
        let rig = rig_with(http, |s| put_alike(s, CLIP, 1));
        becomes_bypassed(&clip(&rig), 1);
    });
}

#[test]
fn a_hidden_clip_that_may_be_another_is_refused() {
    each(|rclone| {
        let options = remote(rclone, "loc:{folder}/source", &["--devname=X"]);
        let rig = rig_with(options, |source| {
            put_alike(source, CLIP, 1);
            put_alike(source, "sub/clip", 2);
        });
        let sub = rig.mountpoint().join("sub/clip");
        becomes_bypassed(&clip(&rig), 1);
        becomes_bypassed(&sub, 2);
        let holder = Holder::of(&sub);
        assert_eq!(read(&clip(&rig), 1), Some(Reason::Ambiguous));
        assert_eq!(read(&sub, 2), None);
        drop(holder);
        becomes_bypassed(&clip(&rig), 1);
    });
}

#[test]
fn a_hidden_remote_is_told_from_an_earlier_one_of_its_name() {
    each(|rclone| {
        let mut rig = rig_with(remote(rclone, "loc:{folder}/source", &[]), |source| {
            put_alike(source, CLIP, 1);
        });
        becomes_bypassed(&clip(&rig), 1);
        rig.unmount();
        // The same cache, another clip; its folder has a hash.
        let cache = rig.cache();
        let over = [
            "--devname=X",
            "--local-no-check-updated",
            "--cache-dir",
            cache.to_str().unwrap(),
        ];
        let source = rig.source();
        put_alike(&source, CLIP, 2);
        let name = format!("loc:{}", source.display());
        let second = rig_with(remote(rclone, &name, &over), |_| {});
        assert_eq!(read(&clip(&second), 2), Some(Reason::Ambiguous));
        let _holder = Holder::of(&clip(&second));
        becomes_bypassed(&clip(&second), 2);
    });
}

#[test]
fn a_hidden_remote_of_a_daemon_that_may_serve_more_is_refused() {
    each(|rclone| {
        let arguments = [
            "--devname=X",
            "--rc",
            "--rc-addr=127.0.0.1:0",
            "--rc-no-auth",
        ];
        let rig = rig_with(
            remote(rclone, "loc:{folder}/source", &arguments),
            |source| {
                put_alike(source, CLIP, 1);
            },
        );
        let _holder = Holder::of(&clip(&rig));
        assert_eq!(read(&clip(&rig), 1), Some(Reason::Unsupported));
    });
}

#[test]
fn a_local_path_above_the_working_folder_is_not_taken_for_a_remote() {
    each(|rclone| {
        let folder = tempfile::tempdir().unwrap();
        put_alike(folder.path(), "clips/clip", 1);
        let relative = format!(
            "../{}/clips",
            folder.path().file_name().unwrap().to_str().unwrap()
        );
        let rig = rig_with(remote(rclone, &relative, &[]), |_| {});
        becomes_bypassed(&clip(&rig), 1);
    });
}

#[test]
fn a_mount_that_ignores_case_is_refused() {
    each(|rclone| {
        let options = remote(rclone, "loc:{folder}/source", &["--vfs-case-insensitive"]);
        let rig = rig_with(options, |s| put_alike(s, CLIP, 1));
        let _holder = Holder::of(&clip(&rig));
        assert_eq!(read(&clip(&rig), 1), Some(Reason::Unsupported));
        assert_eq!(
            read(&rig.mountpoint().join("CLIP"), 1),
            Some(Reason::Unsupported)
        );
    });
}

/// Renamed at the remote to what looks the same, while the old one is in use.
#[test]
fn a_name_that_rclone_normalises_is_not_taken_for_the_old_one() {
    let (composed, decomposed) = ("\u{e9}.y4m", "e\u{301}.y4m");
    each(|rclone| {
        let arguments = ["--dir-cache-time=0s", "--attr-timeout=0s"];
        let rig = rig_with(
            remote(rclone, "loc:{folder}/source", &arguments),
            |source| {
                put_alike(source, decomposed, 1);
            },
        );
        let path = rig.mountpoint().join(decomposed);
        becomes_bypassed(&path, 1);
        let _holder = Holder::of(&path);
        fs::remove_file(rig.source().join(decomposed)).unwrap();
        put_alike(&rig.source(), composed, 2);
        let other = Holder::of(&rig.mountpoint().join(composed));
        // Before normalising came, the old name leads nowhere.
        if let Ok(bytes) = fs::read(&path) {
            assert_eq!(bytes, content(2, SIZE));
            assert_eq!(read(&path, 2), Some(Reason::Unsupported));
        }
        drop(other);
        becomes_bypassed(&rig.mountpoint().join(composed), 2);
    });
}

#[test]
fn two_mounts_on_one_cache_may_not_overlap() {
    each(|rclone| {
        let folders = |source: &Path| {
            put_alike(source, "a/clip", 1);
            put_alike(source, "b/clip", 2);
        };
        let first = rig_with(remote(rclone, "loc:{folder}/source/a", &[]), folders);
        let cache = first.cache();
        let arguments = ["--cache-dir", cache.to_str().unwrap()];
        let second = |name: &str| {
            let name = name.replace("{source}", first.source().to_str().unwrap());
            rig_with(remote(rclone, &name, &arguments), |_| {})
        };
        for name in [
            "loc:{source}/b",
            "a:{source}/b",
            ":local:{source}/b",
            "{source}/b",
        ] {
            let other = second(name);
            becomes_bypassed(&clip(&first), 1);
            becomes_bypassed(&clip(&other), 2);
            both_bypassed(&clip(&first), &clip(&other));
        }
        for (name, path, seed) in [
            ("loc:{source}", "b/clip", 2),
            ("loc:{source}/a/", "clip", 1),
        ] {
            let other = second(name);
            let path = other.mountpoint().join(path);
            assert_eq!(read(&clip(&first), 1), Some(Reason::Unsupported), "{name}");
            assert_eq!(read(&path, seed), Some(Reason::Unsupported), "{name}");
        }
        becomes_bypassed(&clip(&first), 1);
    });
}

#[test]
fn a_bind_mount_of_a_sub_folder_is_bypassed() {
    each(|rclone| {
        let rig = rig_with(remote(rclone, "loc:{folder}/source", &[]), |source| {
            put_alike(source, CLIP, 1);
            put_alike(source, "sub/deep/clip", 2);
        });
        let point = tempfile::tempdir().unwrap();
        let mount = |program: &str, arguments: &[&Path]| {
            assert!(
                Command::new(program)
                    .args(arguments)
                    .status()
                    .unwrap()
                    .success()
            );
        };
        mount(
            "mount",
            &[
                Path::new("--bind"),
                &rig.mountpoint().join("sub"),
                point.path(),
            ],
        );
        let path = point.path().join("deep/clip");
        fs::read(&path).unwrap();
        eventually("a bypassed clip", || read(&path, 2).is_none());
        mount("umount", &[point.path()]);
    });
}

#[test]
fn a_daemon_in_the_background_is_found() {
    each(|rclone| {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        put_alike(folder.path(), "source/clip", 1);
        fs::create_dir(path("mount")).unwrap();
        let helper = path("mount.rclone");
        let program = Command::new("which").arg(rclone).output().unwrap().stdout;
        let program = String::from_utf8(program).unwrap();
        std::os::unix::fs::symlink(program.trim(), &helper).unwrap();
        let options = "ro,vfs_cache_mode=full,cache_dir=cache,config=/dev/null";
        let arguments: [(&Path, &[&str]); 3] = [
            (
                rclone,
                &[
                    "--config=",
                    "mount",
                    ":local:source",
                    "mount",
                    "--daemon",
                    "--read-only",
                    "--vfs-cache-mode=full",
                    "--cache-dir=cache",
                ],
            ),
            (&helper, &[":local:source", "mount", "-o", options]),
            (
                &helper,
                &[
                    ":local:source",
                    "mount",
                    "-o",
                    &format!("{options},args2env"),
                ],
            ),
        ];
        for (program, arguments) in arguments {
            let started = Command::new(program)
                .args(arguments)
                .envs(closed_at_once(rclone))
                .current_dir(folder.path())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            assert!(started.unwrap().success());
            becomes_bypassed(&path("mount/clip"), 1);
            let unmounted = Command::new("umount").arg(path("mount")).status();
            assert!(unmounted.unwrap().success());
        }
    });
}

/// `unshare` with a file system of its own at `hidden`, and a mount that comes
/// to us.
#[test]
fn a_cache_that_only_its_daemon_sees_is_read() {
    each(|rclone| {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        put_alike(folder.path(), "source/clip", 1);
        for name in ["shared", "hidden"] {
            fs::create_dir(path(name)).unwrap();
        }
        let run = |script: &str| {
            let status = Command::new("sh")
                .args(["-ec", script])
                .current_dir(folder.path())
                .status();
            assert!(status.unwrap().success(), "{script}");
        };
        run("mount -t tmpfs none shared && mount --make-shared shared && mkdir shared/mount");
        let mut daemon = Command::new("unshare")
            .args(["-m", "--propagation", "unchanged", "sh", "-ec"])
            .arg(
                "mount --make-private -t tmpfs none hidden\n\
                 exec \"$0\" --config= mount :local:source shared/mount --read-only \
                 --vfs-cache-mode=full --cache-dir=hidden/cache",
            )
            .arg(rclone)
            .envs(closed_at_once(rclone))
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let clip = path("shared/mount/clip");
        eventually("the mount", || clip.exists());
        becomes_bypassed(&clip, 1);
        let is_hidden = fs::read_dir(path("hidden")).unwrap().next().is_none();
        run("umount shared/mount");
        daemon.wait().unwrap();
        run("umount shared");
        assert!(is_hidden, "the cache is in the daemon's namespace alone");
    });
}

#[test]
fn an_alias_mounted_elsewhere_on_the_same_cache_is_seen() {
    each(|rclone| {
        let rig = rig_with(remote(rclone, "loc:{folder}/source", &[]), |source| {
            put_alike(source, CLIP, 1);
        });
        becomes_bypassed(&clip(&rig), 1);
        let point = tempfile::tempdir().unwrap();
        let mut hidden = Command::new("unshare")
            .args(["-m", "--propagation", "private"])
            .arg(rclone)
            .args(["--config=", "mount", "al:"])
            .arg(point.path())
            .args(["--vfs-cache-mode=full", "--cache-dir"])
            .arg(rig.cache())
            .env("RCLONE_CONFIG_LOC_TYPE", "local")
            .env("RCLONE_CONFIG_AL_TYPE", "alias")
            .env(
                "RCLONE_CONFIG_AL_REMOTE",
                format!("loc:{}", rig.source().display()),
            )
            .spawn()
            .unwrap();
        let table = format!("/proc/{}/mountinfo", hidden.id());
        let name = point.path().to_str().unwrap().to_owned();
        eventually("a hidden mount", || {
            fs::read_to_string(&table).unwrap().contains(&name)
        });
        // Our own table has not changed; a new mount's has.
        let rig = remounted(rig);
        let refusal = read(&clip(&rig), 1);
        hidden.kill().unwrap();
        hidden.wait().unwrap();
        assert_eq!(refusal, Some(Reason::Unsupported));
    });
}

fn remounted(mut rig: Rig) -> Rig {
    rig.unmount();
    rig.mount().unwrap();
    rig
}
