//! The libraries as programs use them: C, C++, Python and Go, on real rclone
//! mounts. The bytes are FUSE's, and they come from the cache.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Clip, content, installed, root, run};

const C: &[&str] = &["gcc", "-std=c11"];
/// What a program is linked with: the shared library, or the archive.
const LINKS: [&str; 2] = ["--libs", "--variable=archive"];

/// Whether an example says that all came from the cache.
fn from_the_cache(stderr: &[u8]) -> bool {
    let said = String::from_utf8_lossy(stderr);
    let wanted = format!(
        "active: {} bytes from the cache, 0 through FUSE\n",
        content().len()
    );
    said == wanted
}

/// Runs an example on a cached clip.
fn is_an_example(command: &mut Command, clip: &Clip) {
    let output = run(command.arg(&clip.path));
    assert!(output.stdout == content());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(from_the_cache(&output.stderr), "{said}");
}

/// Runs an example on what is not there.
fn tells_errors(command: &mut Command) {
    let output = command.arg("/no/such/clip").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).to_lowercase();
    assert!(said.contains("no such file or directory"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

fn check(program: &Path, mode: &str, clip: &Clip) -> Command {
    let mut command = installed().command(program);
    command.arg(mode).arg(&clip.path).arg(&clip.copy);
    command
}

#[test]
fn c_reads_by_both_libraries() {
    let programs = LINKS.map(|link| installed().compile(C, "tests/c/check.c", link));
    for (program, shared) in programs.iter().zip([true, false]) {
        let needed = run(Command::new("readelf").arg("-d").arg(program)).stdout;
        let needed = String::from_utf8(needed).unwrap();
        assert_eq!(needed.contains("[libvmafx_bypass.so.1]"), shared);
        Clip::each(|clip| {
            run(&mut check(program, "uncached", clip));
            let _held = clip.cache();
            run(&mut check(program, "cached", clip));
            run(check(program, "disabled", clip).env("VMAFX_EBPF_BYPASS", "0"));
            // At last: the mount is another then.
            run(&mut check(program, "forked", clip));
        });
    }
}

/// Nothing lost, and nothing read that was not written. What a static holds is
/// "possibly lost" where it is pointed to from within, as a HashMap's table is.
#[test]
fn c_leaves_no_memory_behind() {
    let program = installed().compile(C, "tests/c/check.c", "--variable=archive");
    let valgrind = |mode: &str, clip: &Clip| {
        let mut command = installed().command("valgrind");
        command
            .args(["--quiet", "--leak-check=full", "--error-exitcode=99"])
            .args([
                "--show-leak-kinds=definite,indirect",
                "--errors-for-leak-kinds=definite,indirect",
            ])
            .args(["--fair-sched=yes"])
            .arg(&program)
            .arg(mode)
            .arg(&clip.path)
            .arg(&clip.copy);
        run(&mut command);
    };
    Clip::each(|clip| {
        valgrind("uncached", clip);
        let _held = clip.cache();
        valgrind("cached", clip);
    });
}

#[test]
fn the_example_in_c_works() {
    let programs = LINKS.map(|link| installed().compile(C, "examples/read.c", link));
    for program in &programs {
        tells_errors(&mut installed().command(program));
    }
    Clip::each(|clip| {
        let _held = clip.cache();
        for program in &programs {
            is_an_example(&mut installed().command(program), clip);
        }
    });
}

/// The header is C++'s, too, of every standard since 2011.
#[test]
fn cplusplus_takes_the_header() {
    for standard in ["-std=c++11", "-std=c++20"] {
        let compiler = ["g++", standard];
        let program = installed().compile(&compiler, "tests/c/check.cpp", "--libs");
        run(&mut installed().command(program));
    }
    let compiler = ["gcc", "-std=c99"];
    installed().compile(&compiler, "examples/read.c", "--libs");
}

fn python(script: &str) -> Command {
    let mut command = installed().command("python3");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(script));
    command
}

#[test]
fn python_reads_by_ctypes() {
    tells_errors(&mut python("examples/read.py"));
    Clip::each(|clip| {
        let _held = clip.cache();
        is_an_example(&mut python("examples/read.py"), clip);
        run(python("tests/check.py").arg(&clip.path).arg(&clip.copy));
    });
}

#[test]
fn go_reads_by_cgo() {
    let program = installed().path().join("read-go");
    let mut build = Command::new("go");
    build
        .args(["build", "-o"])
        .arg(&program)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/read.go"))
        .env("PKG_CONFIG_PATH", installed().lib().join("pkgconfig"))
        .env("GOCACHE", go_cache())
        .env("GO111MODULE", "off");
    run(&mut build);
    let go = || installed().command(&program);
    tells_errors(&mut go());
    Clip::each(|clip| {
        let _held = clip.cache();
        is_an_example(&mut go(), clip);
    });
}

/// Not the user's.
fn go_cache() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("go-cache")
}

/// Anything else would clash with what a program has of the same name.
#[test]
fn the_shared_library_exports_its_functions_alone() {
    let library = installed().lib().join("libvmafx_bypass.so");
    let names = run(Command::new("nm")
        .args(["-D", "--defined-only", "--format=posix"])
        .arg(&library));
    let names = String::from_utf8(names.stdout).unwrap();
    let header = fs::read_to_string(root().join("capi/include/vmafx_bypass.h")).unwrap();
    let names: Vec<_> = names
        .lines()
        .map(|line| line.split(' ').next().unwrap())
        .collect();
    assert!(names.len() >= 19);
    for name in names {
        assert!(header.contains(&format!("{name}(")), "{name}");
    }
    // Neither of eBPF's: no libelf to be installed.
    let needed = run(Command::new("readelf").arg("-d").arg(&library)).stdout;
    let needed = String::from_utf8(needed).unwrap();
    assert!(
        needed.contains("soname: [libvmafx_bypass.so.1]"),
        "{needed}"
    );
    for line in needed.lines().filter(|line| line.contains("(NEEDED)")) {
        let known = ["[libc.so.", "[libm.so.", "[libgcc_s.so.", "[ld-linux"];
        assert!(known.iter().any(|k| line.contains(k)), "{line}");
    }
}
