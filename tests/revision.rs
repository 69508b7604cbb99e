//! The revision that `--version` names, in work trees of many kinds.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../build/revision.rs"]
mod revision;

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

fn git(root: &Path, args: &[&str]) -> String {
    let output = Command::new("git")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .args(["-c", "user.name=t", "-c", "user.email=t@t.invalid", "-C"])
        .arg(root)
        .args(args)
        .output()
        .unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A work tree with one commit, and its name.
fn repository() -> (TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    git(dir.path(), &["init", "-q", "-b", "main"]);
    fs::create_dir(dir.path().join("src")).unwrap();
    fs::write(dir.path().join("src/lib.rs"), "").unwrap();
    fs::write(dir.path().join("notes"), "").unwrap();
    git(dir.path(), &["add", "."]);
    git(dir.path(), &["commit", "-q", "-m", "one"]);
    let commit = git(dir.path(), &["rev-parse", "--short=12", "HEAD"]);
    (dir, commit)
}

fn exact(root: &Path) -> String {
    revision::of(root, true).name
}

#[test]
fn a_commit_is_named_and_changed_sources_are_told() {
    let (dir, commit) = repository();
    let root = dir.path();
    assert_eq!(exact(root), commit);
    fs::write(root.join("notes"), "changed").unwrap();
    assert_eq!(exact(root), commit, "it is no source");
    fs::write(root.join("src/new.rs"), "").unwrap();
    assert_eq!(exact(root), format!("{commit}-dirty"), "untracked");
    fs::remove_file(root.join("src/new.rs")).unwrap();
    fs::write(root.join("src/lib.rs"), "changed").unwrap();
    assert_eq!(exact(root), format!("{commit}-dirty"), "changed");
    git(root, &["add", "src"]);
    assert_eq!(exact(root), format!("{commit}-dirty"), "staged");
    git(root, &["reset", "-q", "--hard"]);
    assert_eq!(exact(root), commit);
    fs::remove_file(root.join("src/lib.rs")).unwrap();
    assert_eq!(exact(root), format!("{commit}-dirty"), "deleted");
}

#[test]
fn an_unoptimised_build_follows_nothing() {
    let (dir, commit) = repository();
    let revision = revision::of(dir.path(), false);
    assert_eq!(revision.name, format!("{commit}-dev"));
    assert!(revision.watched.is_empty());
}

#[test]
fn what_is_watched_exists_and_changes_with_every_commit() {
    let (dir, _) = repository();
    git(dir.path(), &["pack-refs", "--all"]);
    let linked = tempfile::tempdir().unwrap();
    let linked = linked.path().join("linked");
    git(
        dir.path(),
        &["worktree", "add", "-q", linked.to_str().unwrap()],
    );
    git(dir.path(), &["checkout", "-q", "--detach"]);
    for root in [dir.path(), &linked] {
        let contents = || {
            let files = revision::of(root, true).watched.into_iter();
            let files = files.filter(|path| !path.starts_with(root.join("src")));
            files
                .map(|path| fs::read(path).unwrap())
                .collect::<Vec<_>>()
        };
        assert!(revision::of(root, true).watched.contains(&root.join("src")));
        let before = contents();
        assert_eq!(before.len(), 2, "HEAD and its log");
        git(root, &["commit", "-q", "--allow-empty", "-m", "two"]);
        assert_ne!(contents(), before, "{}", root.display());
    }
}

#[test]
fn without_a_repository_of_its_own_it_is_unknown() {
    let plain = tempfile::tempdir().unwrap();
    assert_eq!(exact(plain.path()), "unknown");
    let (dir, _) = repository();
    assert_eq!(exact(&dir.path().join("src")), "unknown");
    let empty = tempfile::tempdir().unwrap();
    git(empty.path(), &["init", "-q"]);
    assert_eq!(exact(empty.path()), "unknown", "no commit yet");
}
