//! The figures, for people and as JSON.

use std::path::Path;

use serde::Serialize;
use vmafx_bypass::mounts::MountTable;

use crate::host::CallFigures;
use crate::load::LoadFigures;
use crate::memory::MemoryFigures;
use crate::tracked::{Mode, Rows};
use crate::{Bench, Outcome};

#[derive(Debug, Serialize)]
pub struct Report {
    kernel: String,
    cpus: usize,
    /// The file systems that "tmpfs" and "disk" stand for.
    file_systems: [String; 2],
    modes: Vec<Mode>,
    pub calls: Vec<CallFigures>,
    pub load: Vec<LoadFigures>,
    pub dups: Vec<LoadFigures>,
    pub memory: Vec<MemoryFigures>,
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl Report {
    pub fn new(bench: &Bench) -> Outcome<Self> {
        let table = MountTable::read()?;
        let kind = |folder: &Path| {
            let mount = table.containing(folder);
            mount.map_or("?".to_owned(), |mount| mount.fstype.clone())
        };
        Ok(Self {
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            cpus: std::thread::available_parallelism()?.get(),
            file_systems: [kind(bench.memory.path()), kind(bench.disk.path())],
            modes: bench.modes.clone(),
            calls: Vec::new(),
            load: Vec::new(),
            dups: Vec::new(),
            memory: Vec::new(),
        })
    }

    pub fn print(&self) {
        let [memory, disk] = &self.file_systems;
        println!(
            "linux {}, {} CPUs; tmpfs is {memory}, disk is {disk}",
            self.kernel, self.cpus
        );
        for mode in &self.modes {
            if let Some(message) = &mode.not_here {
                println!("{}: not here: {message}", mode.name);
            }
        }
        self.print_calls();
        print_load("open+close of the clip", &self.load);
        print_load("dup+close of one descriptor", &self.dups);
        self.print_memory();
    }

    fn print_calls(&self) {
        if self.calls.is_empty() {
            return;
        }
        println!(
            "\n{:<18} {:<12} {:>10} {:>8}  half of {} rounds",
            "one call", "run", "time", "ratio", self.calls[0].rounds
        );
        for figure in &self.calls {
            let ratio = figure.ratio;
            let ns = figure.ns.p50;
            let time = if ns < 10_000.0 {
                format!("{ns:.1} ns")
            } else {
                format!("{:.1} us", ns / 1e3)
            };
            println!(
                "{:<18} {:<12} {time:>10} {:>8.3} {:>8.3} … {:.3}",
                figure.call,
                figure.mode.as_deref().unwrap_or("-"),
                ratio.p50,
                ratio.p25,
                ratio.p75
            );
        }
    }

    fn print_memory(&self) {
        if self.memory.is_empty() {
            return;
        }
        println!(
            "\n{:<12} {:<18} {:>8} {:>8} {:>8} {:>8} {:>8} {:>12} {:>10} {:>10}",
            "memory, MiB",
            "arguments",
            "tracked",
            "RSS",
            "anon",
            "file",
            "peak",
            "kernel maps",
            "dump json",
            "table"
        );
        for figure in &self.memory {
            println!(
                "{:<12} {:<18} {:>8} {:>8.1} {:>8.1} {:>8.1} {:>8.1} {:>12.1} {:>7.0} ms {:>7.0} ms",
                figure.mode,
                figure.arguments.join(" "),
                figure.tracked,
                mib(figure.rss),
                mib(figure.anonymous),
                mib(figure.files + figure.shared),
                mib(figure.peak),
                mib(figure.maps.values().sum()),
                figure.dump_json_ms.p50,
                figure.dump_table_ms.p50,
            );
        }
        let largest = |figure: &MemoryFigures| {
            let mut maps: Vec<_> = figure.maps.iter().collect();
            maps.sort_by_key(|(_, bytes)| std::cmp::Reverse(**bytes));
            let shown = maps.iter().take(5);
            let shown = shown.map(|(name, bytes)| format!("{name} {:.1}", mib(**bytes)));
            shown.collect::<Vec<_>>().join(", ")
        };
        for figure in &self.memory {
            println!("  maps with {}: {}", figure.tracked, largest(figure));
        }
    }
}

fn print_load(what: &str, figures: &[LoadFigures]) {
    if figures.is_empty() {
        return;
    }
    println!(
        "\n{what:<28} {:<5} {:>10} {:>8} {:>8}  lost",
        "rows", "per s", "ratio", "CPU"
    );
    for figure in figures {
        let lost: Vec<_> = figure
            .lost
            .iter()
            .map(|(c, n)| format!("{c} {n}"))
            .collect();
        println!(
            "{:<28} {:<5} {:>10.0} {:>8} {:>8}  {}",
            figure.mode.as_deref().unwrap_or("-"),
            match (figure.rows, &figure.mode) {
                (_, None) => "-",
                (Rows::Json, _) => "json",
                (Rows::None, _) => "none",
            },
            figure.per_second,
            figure.ratio.map_or("-".into(), |r| format!("{r:.3}")),
            figure
                .cpu_percent
                .map_or("-".into(), |p| format!("{p:.1} %")),
            if lost.is_empty() {
                "nothing".to_owned()
            } else {
                lost.join(", ")
            }
        );
    }
}
