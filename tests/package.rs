//! What packages are made of: man pages, completions, and a Debian package that is
//! installed, used and purged. `release` builds are too slow for a test: it packs
//! the program as it was built for tests.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{need_root, program, run, stderr};

fn text(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// The commands that `--help` shows.
fn commands() -> BTreeSet<String> {
    let help = text(program().arg("--help"));
    let list = help
        .split("Commands:\n")
        .nth(1)
        .unwrap()
        .split("\n\n")
        .next()
        .unwrap();
    let names = list.lines().filter_map(|line| line.strip_prefix("  "));
    let names = names.filter(|line| !line.starts_with(' '));
    names
        .filter_map(|line| line.split(' ').next())
        .filter(|&name| name != "help")
        .map(Into::into)
        .collect()
}

#[test]
fn every_command_has_a_man_page_that_reads_without_warnings() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("man");
    text(program().args(["generate", "man"]).arg(&folder));
    let pages: BTreeSet<_> = fs::read_dir(&folder)
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    let mut expected: BTreeSet<_> = commands()
        .iter()
        .map(|name| folder.join(format!("vmafx-bypass-{name}.1")))
        .collect();
    assert!(expected.len() >= 8, "{expected:?}");
    expected.insert(folder.join("vmafx-bypass.1"));
    assert_eq!(pages, expected);
    for page in &pages {
        let output = Command::new("man")
            .env("LC_ALL", "C.UTF-8")
            .args(["--warnings", "--encoding=UTF-8", "-P", "cat", "-l"])
            .arg(page)
            .output()
            .unwrap();
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{}",
            stderr(&output)
        );
        let shown = String::from_utf8(output.stdout).unwrap();
        for section in [
            "SYNOPSIS",
            "OPTIONS",
            "EXIT STATUS",
            "ENVIRONMENT",
            "FILES",
            "SEE ALSO",
        ] {
            assert!(
                shown.contains(&format!("\n{section}\n")),
                "{section} of {}",
                page.display()
            );
        }
        assert!(shown.contains("VMAFX_EBPF_BYPASS") && shown.contains("VMAFX_BYPASS_SOCKET"));
    }
    // A command's own codes, and not those of all.
    let exec = fs::read_to_string(folder.join("vmafx-bypass-exec.1")).unwrap();
    assert!(exec.contains("127 it was not found"), "{exec}");
}

#[test]
fn completions_offer_what_help_shows() {
    for shell in ["bash", "zsh", "fish"] {
        let script = text(program().args(["generate", "completions", shell]));
        for name in commands() {
            assert!(script.contains(&name), "{name} for {shell}");
        }
        assert!(
            !script.contains("generate completions"),
            "hidden, for {shell}"
        );
    }
    assert_eq!(
        run(&["generate", "completions", "none"]).status.code(),
        Some(2)
    );
}

/// Packs the program that was built for tests.
fn pack() -> PathBuf {
    let built = Path::new(env!("CARGO_BIN_EXE_vmafx-bypass"));
    let target = built.ancestors().nth(2).unwrap();
    let folder = target.join("package-test");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(folder.join("release")).unwrap();
    fs::hard_link(built, folder.join("release/vmafx-bypass")).unwrap();
    let printed = text(
        Command::new("scripts/deb.sh")
            .arg("--fast")
            .env("CARGO_TARGET_DIR", &folder)
            .env("TOOLS", target.join("tools")),
    );
    printed.trim().into()
}

#[test]
fn the_debian_package_is_installed_used_and_purged_without_a_trace() {
    need_root();
    let package = pack();
    let field = |name| {
        text(
            Command::new("dpkg-deb")
                .arg("--field")
                .arg(&package)
                .arg(name),
        )
    };
    let depends = field("Depends");
    for library in ["libc6 (>= ", "libelf1 (>= ", "zlib1g (>= "] {
        assert!(depends.contains(library), "{depends}");
    }
    assert_eq!(field("Recommends").trim(), "rclone, fuse3");
    let listing = text(Command::new("dpkg-deb").arg("--contents").arg(&package));
    let files: BTreeSet<_> = listing
        .lines()
        .filter_map(|line| line.rsplit(' ').next())
        .collect();
    for name in commands() {
        let page = format!("./usr/share/man/man1/vmafx-bypass-{name}.1.gz");
        assert!(files.contains(page.as_str()), "{page}");
    }
    for file in [
        "./etc/default/vmafx-bypass",
        "./usr/bin/vmafx-bypass",
        "./usr/lib/systemd/system/vmafx-bypass.service",
        "./usr/lib/systemd/system/vmafx-bypass.socket",
        "./usr/share/doc/vmafx-bypass/README.md",
        "./usr/share/doc/vmafx-bypass/changelog.Debian.gz",
        "./usr/share/doc/vmafx-bypass/copyright",
        "./usr/share/doc/vmafx-bypass/docs/REFERENCE.md",
        "./usr/share/man/man1/vmafx-bypass.1.gz",
    ] {
        assert!(files.contains(file), "{file} of {listing}");
    }
    let version = text(program().arg("--version"));
    let said = text(
        Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "private",
                "tests/package/install.sh",
            ])
            .arg(&package)
            .arg(version.trim()),
    );
    assert_eq!(said, "installed, used, removed and purged\n");
}
