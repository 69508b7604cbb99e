//! ffmpeg on the mount, under `exec`, and on a local copy.

use crate::{Bench, CLIPS, Outcome, Spread, Way};

/// Each worker's runs: the first makes the snapshots, the others use them.
const RUNS: usize = 4;

pub fn measure(bench: &Bench) -> Outcome<()> {
    let [a, b] = CLIPS;
    let null = ["-f", "null", "-"];
    let decode = [&["-i", a][..], &null].concat();
    let psnr = [&["-i", a, "-i", b, "-lavfi", "psnr"][..], &null].concat();
    println!(
        "\n{:<8} {:<14} {:>10}  {:>24}  {:>24}",
        "ffmpeg", "", "median", "mount takes x times as long", "x of the local copy"
    );
    for (name, args) in [("decode", decode), ("psnr", psnr)] {
        let times = RUNS.to_string();
        let task = [&["ffmpeg", &times][..], &args].concat();
        let (mount, local) = (bench.rig.mountpoint(), bench.rig.source());
        let ways = [
            (Way::Plain, &mount),
            (Way::Exec, &mount),
            (Way::Plain, &local),
        ];
        // What is read first from the disk is not what is to be compared.
        bench.work(Way::Plain, &mount, &task)?;
        bench.work(Way::Plain, &local, &task)?;
        let mut runs = [const { Vec::new() }; 3];
        for round in 0..bench.rounds {
            for offset in 0..ways.len() {
                let index = (round + offset) % ways.len();
                let (way, folder) = ways[index];
                runs[index].push(bench.work(way, folder, &task)?);
            }
        }
        let best = |runs: &Vec<f64>| runs[1..].iter().copied().fold(f64::INFINITY, f64::min);
        let first = |runs: &Vec<f64>| runs[0];
        let of = |index: usize, pick: &dyn Fn(&Vec<f64>) -> f64| -> Vec<f64> {
            runs[index].iter().map(pick).collect()
        };
        for (way, index, pick) in [
            ("mount, first", 0, &first as &dyn Fn(&Vec<f64>) -> f64),
            ("mount, later", 0, &best),
            ("exec, first", 1, &first),
            ("exec, later", 1, &best),
            ("local, first", 2, &first),
            ("local, later", 2, &best),
        ] {
            let own = of(index, pick);
            let ratio = |other: Vec<f64>, up: bool| {
                let pairs = own.iter().zip(&other);
                let all = pairs.map(|(own, other)| if up { other / own } else { own / other });
                let Spread { p25, p50, p75 } = Spread::of(all.collect());
                format!("{p50:.2} ({p25:.2} to {p75:.2})")
            };
            println!(
                "{name:<8} {way:<14} {:>7.0} ms  {:>24}  {:>24}",
                Spread::of(own.clone()).p50 / 1e6,
                ratio(of(0, pick), true),
                ratio(of(2, pick), false)
            );
        }
    }
    Ok(())
}
