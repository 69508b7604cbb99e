//! deploy/: the charts by helm and the API's schemas, and pods as they are rendered, by
//! runc with their capabilities, mounts and seccomp profile, on a real rclone.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

use std::process::Command;

/// Runs a script of tests/deploy to its end.
fn script(name: &str) {
    let path = format!("{}/tests/deploy/{name}", env!("CARGO_MANIFEST_DIR"));
    let output = Command::new("python3")
        .arg(path)
        .env("VMAFX_BYPASS", env!("CARGO_BIN_EXE_vmafx-bypass"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    // unittest succeeds also where it finds no test.
    assert!(
        text.contains("\nRan ") && !text.contains("\nRan 0 "),
        "{text}"
    );
    assert!(!text.contains("skipped"), "{text}");
}

#[test]
fn charts_profiles_and_dockerfile_are_what_the_guide_says() {
    script("test_chart.py");
}

#[test]
fn pods_run_as_they_are_rendered() {
    script("test_pod.py");
}
