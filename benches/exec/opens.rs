//! One open: of files that are no clips, and of clips, first and again.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use vmafx_bypass::Clips;
use vmafx_bypass::handover::{Server, ServerOptions};
use vmafx_bypass::snapshot::{SnapshotMode, SnapshotOptions, Snapshots};

use crate::{Bench, Outcome, Spread, Way, rank};

/// Opens of one worker; the first of them is not among the repeated ones.
const OPENS: usize = 3_000;

/// A worker's figures: the first, and of the others the median and the 99th.
struct Figures {
    first: f64,
    p50: f64,
    p99: f64,
}

impl Figures {
    fn of(mut samples: Vec<f64>) -> Self {
        let first = samples.remove(0);
        samples.sort_by(f64::total_cmp);
        Self {
            first,
            p50: rank(&samples, 0.5),
            p99: rank(&samples, 0.99),
        }
    }
}

pub fn measure(bench: &Bench) -> Outcome<()> {
    let folder = tempfile::Builder::new().prefix("vmafx-bench-").tempdir()?;
    fs::set_permissions(
        folder.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    fs::write(folder.path().join("file"), b"text")?;
    let socket = folder.path().join("socket");
    let snapshots = Snapshots::new(SnapshotOptions {
        mode: SnapshotMode::Auto,
        copy_budget: 1 << 30,
    });
    let clips = Clips::new(vec![bench.rig.mountpoint()], Arc::new(snapshots));
    let options = ServerOptions {
        mode: 0o666,
        ..ServerOptions::new(socket.clone())
    };
    let _server = Server::start(options, Arc::new(clips))?;
    let mount = bench.rig.mountpoint();
    println!(
        "\n{:<28} {:>10} {:>10} {:>10}  us, medians of the rounds; under exec also what is added",
        "one open", "first", "p50", "p99"
    );
    let server = Way::Server(&socket);
    let absolute = folder.path().join("file");
    let nothing = folder.path().join("nothing");
    let relative = (folder.path(), "file");
    let absolute = (folder.path(), absolute.to_str().ok_or("path")?);
    let nothing = (folder.path(), nothing.to_str().ok_or("path")?);
    let clip = (mount.as_path(), "small");
    let large = (mount.as_path(), "a.y4m");
    for (name, (folder, path), ways) in [
        ("a local file", absolute, &[Way::Plain, Way::Exec][..]),
        ("the same, relative", relative, &[Way::Plain, Way::Exec]),
        ("nothing there", nothing, &[Way::Plain, Way::Exec]),
        ("a clip of 1 MiB", clip, &[Way::Plain, Way::Exec, server]),
        ("a clip of 178 MiB", large, &[Way::Plain, Way::Exec]),
    ] {
        let times = OPENS.to_string();
        rounds(bench, name, folder, &["open", &times, path], ways)?;
    }
    Ok(())
}

fn rounds(bench: &Bench, name: &str, folder: &Path, task: &[&str], ways: &[Way]) -> Outcome<()> {
    let mut all: Vec<Vec<Figures>> = ways.iter().map(|_| Vec::new()).collect();
    for round in 0..bench.rounds {
        for offset in 0..ways.len() {
            let index = (round + offset) % ways.len();
            let samples = bench.work(ways[index], folder, task)?;
            all[index].push(Figures::of(samples));
        }
    }
    for (index, way) in ways.iter().enumerate() {
        let median = |pick: &dyn Fn(&Figures) -> f64| {
            Spread::of(all[index].iter().map(pick).collect()).p50 / 1e3
        };
        let added = |pick: &dyn Fn(&Figures) -> f64| {
            let pairs = all[index].iter().zip(&all[0]);
            Spread::of(pairs.map(|(own, plain)| pick(own) - pick(plain)).collect()).p50 / 1e3
        };
        let way = match way {
            Way::Plain => "plain",
            Way::Exec => "exec",
            Way::Server(_) => "exec by a server",
        };
        print!(
            "{:<28} {:>10.1} {:>10.1} {:>10.1}",
            format!("{name}, {way}"),
            median(&|f| f.first),
            median(&|f| f.p50),
            median(&|f| f.p99),
        );
        if index > 0 {
            print!("  {:+.1}, p99 {:+.1}", added(&|f| f.p50), added(&|f| f.p99));
        }
        println!();
    }
    Ok(())
}
