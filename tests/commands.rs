//! The commands in the documents are as they say: each is one that the program takes,
//! and those of the README's "Use" do what is said.
#![cfg(all(feature = "ebpf", feature = "mount", feature = "top"))]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use common::{eventually, need_root, program, rig, stderr};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const README: &str = include_str!("../README.md");

/// Every document of the repository.
fn documents() -> Vec<(PathBuf, String)> {
    let mut folders = vec![
        PathBuf::from("."),
        "docs".into(),
        "deploy".into(),
        "capi".into(),
    ];
    let mut documents = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() && folder != Path::new(".") {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "md") {
                let text = fs::read_to_string(&path).unwrap();
                documents.push((path, text));
            }
        }
    }
    documents
}

/// The commands of this program in a text: lines of code, and code within sentences.
fn commands(text: &str) -> Vec<String> {
    let joined = text.replace("\\\n", " ");
    let lines = joined.lines().filter(|line| line.starts_with("    "));
    let lines = lines.map(|line| line.trim().trim_start_matches("$ "));
    let within = text.split('`').skip(1).step_by(2);
    lines
        .chain(within)
        .filter_map(|code| {
            // A sentence may be broken within one.
            let code = code.replace('\n', " ");
            let words: Vec<&str> = code.split_whitespace().collect();
            let first = words.iter().position(|word| !word.contains('='))?;
            (words[first] == "vmafx-bypass").then(|| words[first + 1..].join(" "))
        })
        .collect()
}

/// A command's words up to where the shell, or the writer, goes on.
fn words(command: &str) -> Vec<&str> {
    let ends = |word: &&str| {
        matches!(
            *word,
            "|" | "&" | "&&" | "||" | ";" | ">" | "2>" | "…" | "#"
        ) || word.starts_with(['>', '#', '('])
            || word.ends_with('…')
    };
    let command = command.split(';').next().unwrap_or_default();
    let words = command.split(' ').filter(|word| !word.is_empty());
    words.take_while(|word| !ends(word)).collect()
}

#[test]
fn every_command_in_the_documents_is_one() {
    let (mut seen, mut wrong) = (0, Vec::new());
    for (path, text) in documents() {
        for command in commands(&text) {
            let mut words = words(&command);
            if words.is_empty() {
                continue;
            }
            // Before the command that `exec` runs.
            let end = words.iter().position(|word| *word == "--");
            words.insert(end.unwrap_or(words.len()), "--help");
            let output = program().args(&words).output().unwrap();
            let said = stderr(&output);
            // A sentence may name an option without its value; a group, one that is
            // not here.
            let named = said.contains("a value is required") || said.contains("is unknown here");
            if !output.status.success() && !named {
                wrong.push(format!("{}: {command}: {said}", path.display()));
            }
            seen += 1;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen > 35, "{seen}");
}

/// What the README has under "Use".
fn use_of() -> Vec<String> {
    let start = README.find("\n## Use\n").unwrap() + 1;
    let section = README[start..].split("\n## ").next().unwrap();
    let joined = section.replace("\\\n", " ");
    let code = joined.lines().filter_map(|line| line.strip_prefix("    "));
    let commands = code.filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    commands.map(str::to_owned).collect()
}

/// One that runs until it is told to end.
struct Background(Child);

impl Background {
    fn end(mut self) {
        kill(Pid::from_raw(self.0.id() as i32), Signal::SIGINT).unwrap();
        assert_eq!(self.0.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // Ended already, unless the test failed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_readme_s_commands_work() {
    need_root();
    let rig = rig(|source| {
        let job = source.join("job42");
        fs::create_dir(&job).unwrap();
        for clip in [source.join("clip.y4m"), job.join("a.y4m")] {
            let made = Command::new("ffmpeg")
                .args([
                    "-v",
                    "error",
                    "-f",
                    "lavfi",
                    "-i",
                    "testsrc2=size=320x180:rate=30",
                ])
                .args(["-frames:v", "16", "-pix_fmt", "yuv420p"])
                .arg(clip)
                .status();
            assert!(made.unwrap().success());
        }
    });
    rig.cache_whole(Path::new("clip.y4m")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir(at("clips")).unwrap();
    let own = program();
    let bin = Path::new(own.get_program()).parent().unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let shell = |line: &str| {
        let mut command = Command::new("sh");
        command
            .args(["-ec", &format!("exec {line}")])
            .env("PATH", &path)
            .env_remove("VMAFX_EBPF_BYPASS")
            .current_dir(folder.path())
            .stdin(Stdio::null());
        command
    };
    let pins = format!("/sys/fs/bpf/vmafx-readme-{}", std::process::id());
    let mut background: Vec<Background> = Vec::new();
    let mut ran = 0;
    for line in use_of() {
        let line = line
            .replace("/rclone-mount", rig.mountpoint().to_str().unwrap())
            .replace("/clips", &at("clips"))
            .replace("/run/vmafx-bypass.sock", &at("socket"));
        // Apart from what else tracks and serves here; and `top` ends by itself.
        let line = [
            ("bypass run", format!("bypass run --pin-dir {pins}")),
            ("dump-map", format!("dump-map --pin-dir {pins}")),
            (
                "bypass top",
                format!("bypass top --count 1 --pin-dir {pins}"),
            ),
            ("--metrics", "--metrics=127.0.0.1:0".into()),
        ]
        .iter()
        .fold(line, |line, (from, to)| line.replace(from, to));
        ran += 1;
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.starts_with(&["VMAFX_EBPF_BYPASS=1", "vmafx-bypass", "run"]) {
            // One at a time, as in one terminal.
            background.drain(..).for_each(Background::end);
            let mut command = shell(&format!("env {line}"));
            let log = fs::File::create(at("run.log")).unwrap();
            let child = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
            background.push(Background(child));
            eventually("attaching", || {
                let log = fs::read_to_string(at("run.log")).unwrap();
                log.contains("attached by")
            });
            continue;
        }
        let Output { status, .. } = output_of(&mut shell(&format!("sh -ec '{line}'")), &line);
        // A busy machine may miss a gate.
        let missed = words.contains(&"bench") && status.code() == Some(5);
        assert!(status.success() || missed, "{line}: {status}");
    }
    background.drain(..).for_each(Background::end);
    let unmounted = Command::new("umount").arg(at("clips")).status().unwrap();
    assert!(unmounted.success());
    assert!(ran > 15, "{ran}");
}

fn output_of(command: &mut Command, line: &str) -> Output {
    let output = command.output().unwrap();
    if !output.status.success() {
        eprintln!("{line}: {}", stderr(&output));
    }
    output
}
