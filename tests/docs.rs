//! The reference names what the code names.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeSet;

use vmafx_bypass::Reason;
use vmafx_bypass::bench::Engine;
use vmafx_bypass::cache::trail::Gate;

const REFERENCE: &str = include_str!("../docs/REFERENCE.md");
const TROUBLESHOOTING: &str = include_str!("../docs/TROUBLESHOOTING.md");
const SEMANTICS: &str = include_str!("../docs/SEMANTICS.md");
const TESTS: &str = concat!(
    include_str!("reader.rs"),
    include_str!("changes.rs"),
    include_str!("writable.rs"),
    include_str!("explain.rs"),
    include_str!("damage.rs"),
    include_str!("renames.rs"),
    include_str!("attack.rs"),
    include_str!("verify.rs"),
    include_str!("quarantine.rs"),
    include_str!("breaker.rs"),
    include_str!("handover.rs"),
    include_str!("handover_strangers.rs"),
    include_str!("handover_quarantine.rs"),
    include_str!("handover_descriptor.rs"),
    include_str!("slow_disk.rs"),
    include_str!("owners.rs"),
    include_str!("snapshot.rs"),
    include_str!("snapshot_store.rs"),
    include_str!("exec.rs"),
    include_str!("exec_paths.rs"),
    include_str!("exec_rights.rs"),
    include_str!("exec_life.rs"),
    include_str!("exec_changes.rs"),
    include_str!("exec_fill.rs"),
    include_str!("exec_handover.rs"),
    include_str!("mount.rs"),
    include_str!("mount_changes.rs"),
    include_str!("mount_kernel.rs"),
    include_str!("mount_edges.rs"),
    include_str!("mount_life.rs"),
    include_str!("../src/reexport/nodes_model.rs"),
    include_str!("torture/main.rs"),
);

/// The first cells, in back-ticks, of the table below a heading of the reference.
fn table(heading: &str) -> BTreeSet<&'static str> {
    table_of(REFERENCE, heading)
}

fn table_of(text: &'static str, heading: &str) -> BTreeSet<&'static str> {
    let start = text.find(&format!("## {heading}\n")).unwrap() + 3;
    let section = text[start..].split("\n## ").next().unwrap();
    let cells = section.lines().filter_map(|line| line.strip_prefix("| `"));
    cells.filter_map(|rest| rest.split('`').next()).collect()
}

#[test]
fn every_reason_is_documented() {
    let reasons: BTreeSet<_> = Reason::ALL.iter().map(|r| r.name()).collect();
    assert_eq!(table("Reasons"), reasons);
}

#[test]
fn every_way_that_is_compared_is_documented() {
    let text = include_str!("../docs/BENCHMARKING.md");
    let engines: BTreeSet<_> = Engine::ALL.iter().map(|e| e.name()).collect();
    let documented = table_of(text, "Ways to read");
    // A build without some of them documents them, too.
    let missing: Vec<_> = engines.difference(&documented).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// The rows below a heading whose first cell is a name in back-ticks, as cells.
fn rows_of(text: &'static str, heading: &str) -> Vec<Vec<&'static str>> {
    let start = text.find(&format!("\n## {heading}\n")).unwrap() + 1;
    let section = text[start..].split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    let cells = |row: &'static str| {
        let row = row.strip_prefix("| ").unwrap();
        row.strip_suffix(" |").unwrap().split(" | ").collect()
    };
    rows.map(cells).collect()
}

#[test]
fn every_reason_has_a_symptom_a_cause_and_a_remedy() {
    let rows = rows_of(TROUBLESHOOTING, "Reasons");
    let names: Vec<_> = rows.iter().map(|row| row[0].trim_matches('`')).collect();
    // In the code's order, each once, and no others.
    let reasons: Vec<_> = Reason::ALL.iter().map(|r| r.name()).collect();
    assert_eq!(names, reasons);
    for row in &rows {
        assert_eq!(row.len(), 4, "{row:?}");
        assert!(row.iter().all(|cell| !cell.trim().is_empty()), "{row:?}");
    }
}

#[cfg(feature = "ebpf")]
#[test]
fn every_loss_has_a_remedy() {
    use vmafx_bypass::tracker::Loss;
    let losses: BTreeSet<_> = Loss::ALL.iter().map(|l| l.name()).collect();
    assert_eq!(table_of(TROUBLESHOOTING, "Losses"), losses);
}

#[test]
fn links_of_the_troubleshooting_page_lead_somewhere() {
    // As they are made of headings where repositories are shown.
    let anchor = |heading: &str| -> String {
        let kept = heading.to_lowercase().replace(' ', "-");
        kept.chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_'))
            .collect()
    };
    let pages = [
        ("", TROUBLESHOOTING),
        ("REFERENCE.md", REFERENCE),
        ("HANDOVER.md", include_str!("../docs/HANDOVER.md")),
        ("BENCHMARKING.md", include_str!("../docs/BENCHMARKING.md")),
        ("SYSTEMD.md", include_str!("../docs/SYSTEMD.md")),
        ("PRIVILEGES.md", include_str!("../docs/PRIVILEGES.md")),
    ];
    let mut links = 0;
    for link in TROUBLESHOOTING.split("](").skip(1) {
        let link = link.split(')').next().unwrap();
        let (page, place) = link.split_once('#').unwrap_or((link, ""));
        let (_, text) = pages.iter().find(|(name, _)| *name == page).unwrap();
        let headings = text.lines().filter(|line| line.starts_with('#'));
        let mut anchors = headings.map(|line| anchor(line.trim_start_matches('#').trim()));
        assert!(
            place.is_empty() || anchors.any(|found| found == place),
            "{link}"
        );
        links += 1;
    }
    assert!(links >= 10);
}

#[test]
fn every_test_that_is_named_exists() {
    let sources = [
        TESTS,
        include_str!("cli.rs"),
        include_str!("tracker_errors.rs"),
        include_str!("tracker_limits.rs"),
    ];
    // Of the library's own tests, by their modules' files.
    let mut all = sources.concat();
    let mut folders = vec![
        std::path::PathBuf::from("src"),
        "tests".into(),
        "capi".into(),
    ];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                all += &std::fs::read_to_string(path).unwrap();
            }
        }
    }
    for text in [
        include_str!("../SECURITY.md"),
        include_str!("../docs/ARCHITECTURE.md"),
        include_str!("../docs/PRIVILEGES.md"),
    ] {
        let names = text.split('`').skip(1).step_by(2);
        let mut tests = 0;
        // Names of tests are sentences.
        for name in names.filter(|name| name.matches('_').count() >= 3) {
            if name
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
            {
                assert!(all.contains(&format!("fn {name}(")), "{name}");
                tests += 1;
            }
        }
        assert!(tests >= 5);
    }
}

#[test]
fn every_gate_is_documented() {
    let gates: BTreeSet<_> = Gate::ALL.iter().map(|g| g.name()).collect();
    assert_eq!(table("Gates"), gates);
}

#[test]
fn every_kind_of_mount_names_a_test_that_exists() {
    let tests = [
        TESTS,
        include_str!("discovery.rs"),
        include_str!("discovery2.rs"),
        include_str!("discovery_rcd.rs"),
        include_str!("../src/cache/rclone/names.rs"),
        include_str!("../src/cache/rclone/start.rs"),
    ]
    .concat();
    let start = REFERENCE.find("## Which mounts are bypassed").unwrap();
    let section = REFERENCE[start..].split("\n## ").next().unwrap();
    let rows = section.lines().filter(|l| l.starts_with("| ")).skip(2);
    let mut names = 0;
    for row in rows {
        let cell = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        for name in cell.split('`').skip(1).step_by(2) {
            assert!(tests.contains(&format!("fn {name}()")), "{name}");
            names += 1;
        }
    }
    assert!(names >= 25);
}

#[test]
fn every_program_that_is_left_alone_is_documented() {
    let programs = vmafx_bypass::exec::EXCLUDED_PROGRAMS.iter().copied();
    assert_eq!(table("Programs that are left alone"), programs.collect());
}

#[cfg(feature = "ebpf")]
#[test]
fn every_loss_is_documented() {
    use vmafx_bypass::tracker::Loss;
    let losses: BTreeSet<_> = Loss::ALL.iter().map(|l| l.name()).collect();
    assert_eq!(table("Losses"), losses);
}

#[test]
fn every_promise_names_a_test_that_exists() {
    let cells = SEMANTICS
        .lines()
        .filter(|l| l.starts_with("| ") && l.contains('`'));
    let mut names = 0;
    for cell in cells.filter_map(|line| line.trim_end_matches(" |").rsplit(" | ").next()) {
        for name in cell.split('`').skip(1).step_by(2) {
            let name = name.rsplit("::").next().unwrap().trim_end_matches('…');
            let known = TESTS.contains(&format!("fn {name}"))
                || include_str!("../src/cache/proof.rs").contains(&format!("fn {name}"));
            assert!(known, "{name}");
            names += 1;
        }
    }
    assert!(names >= 40);
}
