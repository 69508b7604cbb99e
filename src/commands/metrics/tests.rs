//! The table, its page, the dashboard and the alerts name the same numbers.

use std::collections::BTreeSet;

use super::family::{ALL, Family};
use prometheus_client::metrics::MetricType;

const PAGE: &str = include_str!("../../../docs/METRICS.md");
const DASHBOARD: &str = include_str!("../../../deploy/grafana/vmafx-bypass.json");
const ALERTS: &str = include_str!("../../../deploy/prometheus/alerts.yaml");

/// A family as the page shows it.
fn row(family: &Family) -> String {
    let labels: Vec<String> = family.labels.iter().map(|l| format!("`{l}`")).collect();
    let Family {
        name,
        unit,
        of,
        stability,
        help,
        ..
    } = family;
    let (kind, labels) = (family.kind.as_str(), labels.join(", "));
    format!("| `{name}` | {kind} | {unit} | {labels} | {of} | {stability} | {help} |")
        .replace("|  |", "| |")
}

#[test]
fn every_number_is_documented_as_it_is() {
    let rows: Vec<String> = ALL.iter().map(row).collect();
    let heading = "| metric | type | unit | labels | of | stability | meaning |";
    let table = PAGE.split(heading).nth(1).unwrap().trim_start();
    let documented: Vec<&str> = table
        .lines()
        .skip(1)
        .take_while(|l| l.starts_with('|'))
        .collect();
    assert_eq!(documented, rows, "should be:\n{}", rows.join("\n"));
}

#[test]
fn names_say_their_type_and_unit() {
    let names: BTreeSet<_> = ALL.iter().map(|family| family.name).collect();
    assert_eq!(names.len(), ALL.len());
    for family in ALL {
        let name = family.name;
        let ours = name.starts_with("vmafx_bypass_") || name.starts_with("process_");
        assert!(ours, "{name}");
        let is_counter = family.kind == MetricType::Counter;
        assert_eq!(name.ends_with("_total"), is_counter, "{name}");
        let (base, unit) = family.parts();
        assert_eq!(
            unit.is_some(),
            matches!(family.unit, "seconds" | "bytes"),
            "{name}"
        );
        if let Some(unit) = unit {
            assert!(
                name.starts_with(&format!("{base}_{}", unit.as_str())),
                "{name}"
            );
        }
        assert!(matches!(family.stability, "stable" | "experimental"));
        // One line of a table, and of both formats.
        assert!(!family.help.contains(['\n', '\\', '|', '"']), "{name}");
    }
}

/// The names of numbers of ours in a text.
fn names(text: &str) -> impl Iterator<Item = &str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("vmafx_bypass_") || word.starts_with("process_"))
}

fn is_known(name: &str) -> bool {
    ALL.iter().any(|family| {
        let suffixes: &[&str] = if family.kind == MetricType::Histogram {
            &["_bucket", "_sum", "_count"]
        } else {
            &[""]
        };
        suffixes
            .iter()
            .any(|suffix| name.strip_suffix(suffix) == Some(family.name))
    })
}

/// The text of every value of a key, at any depth.
fn values<'a>(value: &'a serde_json::Value, key: &str, found: &mut Vec<&'a str>) {
    match value {
        serde_json::Value::Object(fields) => {
            for (name, value) in fields {
                if name == key {
                    found.extend(value.as_str());
                }
                values(value, key, found);
            }
        }
        serde_json::Value::Array(items) => items.iter().for_each(|v| values(v, key, found)),
        _ => {}
    }
}

#[test]
fn dashboard_and_alerts_name_what_there_is() {
    let dashboard = serde_json::from_str(DASHBOARD).unwrap();
    let mut expressions = Vec::new();
    for key in ["expr", "query", "definition"] {
        values(&dashboard, key, &mut expressions);
    }
    let shown: BTreeSet<&str> = expressions.iter().flat_map(|e| names(e)).collect();
    let alerted: BTreeSet<&str> = names(ALERTS).collect();
    for name in shown.union(&alerted) {
        assert!(is_known(name), "{name}");
    }
    // The dashboard leaves out what can be seen by others.
    for family in ALL {
        let is_shown = shown.iter().any(|name| name.starts_with(family.name));
        let left_out = ["attach_info", "mounts", "process_start_time_seconds"];
        assert_ne!(
            is_shown,
            left_out.iter().any(|end| family.name.ends_with(end)),
            "{}",
            family.name
        );
    }
}

#[test]
fn the_dashboard_asks_for_its_data_source_and_overlaps_nowhere() {
    let dashboard: serde_json::Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut ids = BTreeSet::new();
    let mut taken = BTreeSet::new();
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64().unwrap()));
        let place = |side: &str| panel["gridPos"][side].as_u64().unwrap();
        for x in place("x")..place("x") + place("w") {
            for y in place("y")..place("y") + place("h") {
                assert!(x < 24 && taken.insert((x, y)), "{}", panel["title"]);
            }
        }
        if panel["type"] != "row" {
            assert_eq!(panel["datasource"]["uid"], "${datasource}");
        }
        for target in panel["targets"].as_array().into_iter().flatten() {
            assert_eq!(target["datasource"]["uid"], "${datasource}");
        }
    }
    assert!(ids.len() > 20);
}
