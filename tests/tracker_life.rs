//! The tracker's table stays right while processes, mounts and threads come
//! and go, and says so where it does not.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use common::fds::{Halted, Open, dumped, end, lost, told, truth};
use common::{
    Tracking, Worker, content, eventually, need_root, patience, put, rclones, rig, rig_of,
};
use nix::sys::signal::Signal;
use nix::unistd::dup2_stdin;
use serde_json::json;
use vmafx_bypass::rig::Rig;
use vmafx_bypass::tracker::{EventKind, Subscription, Update};
use vmafx_bypass::{BypassFile, Tracker, TrackerOptions};

/// A mount of small clips, `0` and so on.
fn rig_of_clips(count: u32) -> Rig {
    rig(|source| {
        for i in 0..count {
            put(source, &i.to_string(), &content(i, 100));
        }
    })
}

/// Opens every clip of the folder.
const OPEN_ALL: &str = "fds=[os.open(name,os.O_RDONLY) for name in os.listdir('.')]";

/// What is open after these events, in order; each must fit the one before.
/// Of threads that race for one number, an open that was reported late comes
/// with its close at once, inside the time of the open that followed it.
fn replay(events: &[(&str, u64, PathBuf)]) -> Open {
    let mut open = BTreeMap::new();
    let mut events = events.iter().peekable();
    while let Some((event, fd, path)) = events.next() {
        let closed_at_once = |next: &&(&str, u64, PathBuf)| next == &&("close", *fd, path.clone());
        if *event != "close" && open.contains_key(fd) && events.next_if(closed_at_once).is_some() {
            continue;
        }
        let before = match *event {
            "close" => open.remove(fd).as_ref() == Some(path),
            _ => open.insert(*fd, path.clone()).is_none(),
        };
        assert!(before, "{event} of {fd} {} does not fit", path.display());
    }
    open.into_iter().collect()
}

#[test]
fn a_process_that_ends_without_closing_leaves_nothing() {
    let rig = rig_of_clips(5);
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    let script = format!("{OPEN_ALL}\nos.dup2(fds[0],77)");
    let workers = [0, 1].map(|_| Worker::start(&rig.mountpoint(), &script, &[]));
    let pids = workers.each_ref().map(Worker::pid);
    let open = pids.map(|pid| truth(pid, &rig.mountpoint()));
    assert_eq!(open[0].len(), 6);
    let [killed, ended] = workers;
    killed.kill();
    let dump = tracking.dump();
    assert_eq!(dumped(&dump, pids[0]), []);
    assert_eq!(dumped(&dump, pids[1]), open[1], "the other's stay");
    ended.end();
    assert_eq!(tracking.dump()["entries"], json!([]));
    let lines = end(tracking);
    for (pid, open) in pids.into_iter().zip(open) {
        let events = told(&lines, pid);
        let (made, closed) = events.split_at(6);
        assert_eq!(replay(made), open);
        assert!(closed.iter().all(|(event, ..)| *event == "close"));
        assert_eq!(replay(&events), []);
    }
}

#[test]
fn a_program_that_has_exited_long_ago_has_its_exact_path() {
    let rig = rig(|source| put(source, "a folder/clip.y4m", b"clip"));
    let clip = rig.mountpoint().join("a folder/clip.y4m");
    let mut tracking = Tracking::start(&rig.mountpoint(), &[]);
    let halted = Halted::new(&tracking);
    let output = Command::new("cat").arg(&clip).output().unwrap();
    assert_eq!(output.stdout, b"clip");
    drop(halted);
    for kind in ["open", "close"] {
        let event = tracking.next_where(|line| line["event"] != "attach");
        assert_eq!(
            (&event["event"], &event["comm"]),
            (&json!(kind), &json!("cat"))
        );
        assert_eq!(event["path"], json!(clip));
    }
    end(tracking);
}

#[test]
fn threads_that_race_for_numbers_leave_the_table_right() {
    let rig = rig_of_clips(12);
    let tracking = Tracking::start(&rig.mountpoint(), &[]);
    // A close gives its number to another thread before it has returned.
    let mut worker = Worker::start(
        &rig.mountpoint(),
        "import random\n\
         names=os.listdir('.'); held=[[] for _ in range(4)]\n\
         def churn(own,stop):\n \
           while not stop.is_set():\n  \
             own.append(os.open(random.choice(names),os.O_RDONLY))\n  \
             if len(own)>2: os.close(own.pop(random.randrange(3)))\n\
         for _ in range(8):\n \
           stop=threading.Event()\n \
           threads=[threading.Thread(target=churn,args=(own,stop)) for own in held]\n \
           for thread in threads: thread.start()\n \
           time.sleep(0.25); stop.set()\n \
           for thread in threads: thread.join()\n \
           step()",
        &[],
    );
    let pid = worker.pid();
    let mut open = Open::new();
    for round in 0..8 {
        open = truth(pid, &rig.mountpoint());
        assert!(open.len() >= 8, "4 threads hold 2 each: {open:?}");
        let dump = tracking.dump();
        assert!(
            lost(&dump).is_empty() || dump["complete"] == false,
            "{dump}"
        );
        if dump["complete"] == true {
            assert_eq!(dumped(&dump, pid), open, "round {round}");
        }
        assert!(round > 0 || dump["complete"] == true, "{:?}", lost(&dump));
        worker.proceed();
    }
    worker.end();
    assert_eq!(tracking.dump()["entries"], json!([]));
    let lines = tracking.end(Signal::SIGTERM);
    let events = told(&lines, pid);
    assert!(events.len() > 200, "{} events are no race", events.len());
    if lost(lines.last().unwrap()).is_empty() {
        // The exit has closed what was open at the last look.
        let (before, at_exit) = events.split_at(events.len() - open.len());
        assert_eq!(replay(before), open);
        assert!(at_exit.iter().all(|(event, ..)| *event == "close"));
        assert_eq!(replay(&events), []);
    }
}

#[test]
fn one_number_that_two_threads_replace_at_once_is_right_each_time() {
    let rig = rig_of_clips(1);
    let clip = File::open(rig.mountpoint().join("0")).unwrap();
    let other = File::open("/dev/null").unwrap();
    let tracker = Tracker::start(TrackerOptions::new(rig.mountpoint())).unwrap();
    // From at once to long after the other thread, however slow its start: each
    // of the two is the last in some rounds.
    let spin = |step: u32| (0..1 << (step % 16)).for_each(|_| std::hint::spin_loop());
    // Standard input, which no test reads: the one number to replace safely.
    dup2_stdin(&other).unwrap();
    let turn = &AtomicU32::new(0);
    let (mut rounds, mut tracked, mut wrong) = (0, 0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1.. {
                // Odd: both replace it now. Even: done.
                while turn.load(Ordering::SeqCst) < 2 * round - 1 {
                    std::hint::spin_loop();
                }
                if turn.load(Ordering::SeqCst) == u32::MAX {
                    break;
                }
                spin(round / 16);
                dup2_stdin(&clip).unwrap();
                turn.fetch_add(1, Ordering::SeqCst);
            }
        });
        let started = Instant::now();
        let raced = |tracked, rounds| 0 < tracked && tracked < rounds;
        // Longer where the machine gives the two no time together.
        while started.elapsed().as_secs() < 4
            || !raced(tracked, rounds) && started.elapsed() < patience()
        {
            rounds += 1;
            turn.store(2 * rounds - 1, Ordering::SeqCst);
            spin(rounds);
            if rounds % 4 == 0 {
                // On one core the other thread has no turn else.
                std::thread::yield_now();
            }
            dup2_stdin(&other).unwrap();
            while turn.load(Ordering::SeqCst) < 2 * rounds {
                std::hint::spin_loop();
            }
            tracker.flush().unwrap();
            let is_clip = fs::read_link("/proc/self/fd/0").unwrap() != Path::new("/dev/null");
            tracked += u32::from(is_clip);
            wrong += u32::from(tracker.lookup(std::process::id(), 0).is_some() != is_clip);
            dup2_stdin(&other).unwrap();
        }
        turn.store(u32::MAX, Ordering::SeqCst);
    });
    assert_eq!(
        (wrong, tracker.losses().total()),
        (0, 0),
        "of {rounds} rounds"
    );
    assert!(
        0 < tracked && tracked < rounds,
        "{tracked} of {rounds} is no race"
    );
}

#[test]
fn a_folder_as_prefix_leaves_out_what_is_beside_it() {
    let rig = rig(|source| {
        for name in [
            "in/clip",
            "in/deep/clip",
            "inside/clip",
            "clip",
            "beside/in/clip",
        ] {
            put(source, name, b"clip");
        }
    });
    let tracking = Tracking::start(&rig.mountpoint().join("in"), &[]);
    let script = "for folder,_,names in os.walk('.'):\n for n in names: os.open(folder+'/'+n,0)";
    let worker = Worker::start(&rig.mountpoint(), script, &[]);
    let pid = worker.pid();
    let mut expected = truth(pid, &rig.mountpoint());
    assert_eq!(expected.len(), 5);
    expected.retain(|(_, path)| path.starts_with(rig.mountpoint().join("in")));
    assert_eq!(expected.len(), 2);
    assert_eq!(dumped(&tracking.dump(), pid), expected);
    worker.end();
    assert_eq!(tracking.dump()["entries"], json!([]));
    let lines = end(tracking);
    let mut opens = told(&lines, pid);
    let closes = opens.split_off(2);
    let fds = |events: Vec<(&str, u64, _)>, kind: &str| -> Open {
        assert!(events.iter().all(|(event, ..)| *event == kind));
        events.into_iter().map(|(_, fd, path)| (fd, path)).collect()
    };
    assert_eq!(fds(opens, "open"), expected);
    assert_eq!(fds(closes, "close"), expected);
}

#[test]
fn two_prefixes_on_two_mounts_are_both_watched() {
    let rigs = [1, 2].map(|seed| rig(|source| put(source, "clip", &content(seed, 10))));
    let [first, second] = rigs.each_ref().map(vmafx_bypass::rig::Rig::mountpoint);
    let tracking = Tracking::start(&first, &["--prefix", second.to_str().unwrap()]);
    let script = "os.open('clip',0); os.open(sys.argv[1]+'/clip',0)";
    let worker = Worker::start(&first, script, &[second.to_str().unwrap()]);
    let shown = dumped(&tracking.dump(), worker.pid());
    let clips = [&first, &second].map(|point| point.join("clip"));
    assert!(shown.iter().map(|(_, path)| path).eq(&clips), "{shown:?}");
    let lines = end(tracking);
    let attached = lines.iter().filter(|line| line["event"] == "attach");
    assert!(
        attached
            .map(|line| line["path"].as_str().unwrap())
            .eq([&first, &second].map(|p| p.to_str().unwrap()))
    );
    assert!(
        told(&lines, worker.pid())
            .iter()
            .map(|(.., path)| path)
            .eq(&clips)
    );
}

/// Waits for a line that says this of the mount.
fn await_mount(tracking: &mut Tracking, event: &str, point: &Path) {
    let line = tracking.next_where(|line| line["event"] != "attach");
    assert_eq!(
        (&line["event"], &line["path"]),
        (&json!(event), &json!(point))
    );
}

#[test]
fn a_mount_that_goes_and_comes_back_is_picked_up_again() {
    for rclone in rclones() {
        let mut rig = rig_of(&rclone, |source| put(source, "clip", b"clip"));
        let point = rig.mountpoint();
        rig.unmount();
        let mut tracking = Tracking::start(&point, &["--wait"]);
        for _ in 0..2 {
            rig.mount().unwrap();
            await_mount(&mut tracking, "mount", &point);
            let mut worker =
                Worker::start(&point, "fd=os.open('clip',0); step(); os.close(fd)", &[]);
            let dump = tracking.dump();
            assert_eq!(dumped(&dump, worker.pid()), truth(worker.pid(), &point));
            assert_eq!(dump["entries"].as_array().unwrap().len(), 1);
            worker.proceed();
            worker.end();
            for kind in ["open", "close"] {
                let event = tracking.next().unwrap();
                assert_eq!(
                    (&event["event"], &event["path"]),
                    (&json!(kind), &json!(point.join("clip")))
                );
            }
            rig.unmount();
            await_mount(&mut tracking, "unmount", &point);
        }
        end(tracking);
    }
}

#[test]
fn a_mount_whose_daemon_is_killed_is_picked_up_again() {
    let mut rig = rig_of_clips(1);
    let mut tracking = Tracking::start(&rig.mountpoint(), &[]);
    let worker = Worker::start(&rig.mountpoint(), OPEN_ALL, &[]);
    rig.kill_daemon();
    // Its descriptor is open all the same.
    assert_eq!(dumped(&tracking.dump(), worker.pid()).len(), 1);
    rig.unmount();
    worker.kill();
    rig.mount().unwrap();
    tracking.next_where(|line| line["event"] == "mount");
    let worker = Worker::start(&rig.mountpoint(), OPEN_ALL, &[]);
    let pid = worker.pid();
    let clip = rig.mountpoint().join("0");
    let dump = tracking.dump();
    assert_eq!(dump["entries"].as_array().unwrap().len(), 1, "{dump}");
    assert_eq!(dumped(&dump, pid)[0].1, clip);
    let lines = end(tracking);
    assert_eq!(told(&lines, pid)[0].2, clip);
}

/// Waits until `dump-map` says that it is complete; it must be the truth then.
fn healed(tracking: &Tracking, worker: &Worker, mount: &Path) -> serde_json::Value {
    let mut dump = tracking.dump();
    eventually("the table's healing", || {
        dump = tracking.dump();
        dump["complete"] == true
    });
    assert_eq!(dumped(&dump, worker.pid()), truth(worker.pid(), mount));
    dump
}

#[test]
fn more_descriptors_than_fit_are_counted_and_found_when_there_is_room() {
    let rig = rig_of_clips(20);
    let mount = rig.mountpoint();
    let tracking = Tracking::start(&mount, &["--max-fds", "8"]);
    let script = format!("{OPEN_ALL}\nstep()\nfor fd in fds[:14]: os.close(fd)\nos.open('0',0)");
    let mut worker = Worker::start(&mount, &script, &[]);
    let open = truth(worker.pid(), &mount);
    let dump = tracking.dump();
    let shown = dumped(&dump, worker.pid());
    assert_eq!((open.len(), shown.len()), (20, 8));
    assert!(shown.iter().all(|entry| open.contains(entry)), "{shown:?}");
    assert_eq!(lost(&dump), ["fds_full"]);
    assert!(dump["losses"]["fds_full"].as_u64() >= Some(12), "{dump}");
    assert_eq!(dump["complete"], false);
    // Room again: of the seven that are left, the first six opens were lost.
    worker.proceed();
    let dump = healed(&tracking, &worker, &mount);
    assert_eq!(lost(&dump), ["fds_full"], "what was lost stays counted");
    let lines = tracking.end(Signal::SIGTERM);
    let summary = lines.last().unwrap();
    assert_eq!(
        (lost(summary), &summary["complete"]),
        (vec!["fds_full"], &json!(true))
    );
    let told = told(&lines, worker.pid());
    assert!(told.iter().any(|(event, ..)| *event == "adopt"), "{told:?}");
}

#[test]
fn events_that_find_no_room_are_counted_and_made_good() {
    let rig = rig_of_clips(100);
    let mount = rig.mountpoint();
    let tracking = Tracking::start(&mount, &["--ring-size", "4KiB"]);
    let halted = Halted::new(&tracking);
    let worker = Worker::start(
        &mount,
        &format!("{OPEN_ALL}\nfor fd in fds[:50]: os.close(fd)"),
        &[],
    );
    let dump = tracking.dump();
    assert_eq!(
        (lost(&dump), &dump["complete"]),
        (vec!["ring_full"], &json!(false))
    );
    let missing = dump["losses"]["ring_full"].as_u64().unwrap();
    assert!((100..150).contains(&missing), "{missing}");
    // The kernel has them all; paths go with the events.
    let open = truth(worker.pid(), &mount);
    let numbers = |open: &Open| open.iter().map(|(fd, _)| *fd).collect::<Vec<_>>();
    assert_eq!(numbers(&dumped(&dump, worker.pid())), numbers(&open));
    drop(halted);
    healed(&tracking, &worker, &mount);
    let pid = worker.pid();
    worker.end();
    eventually("the end of it", || dumped(&tracking.dump(), pid).is_empty());
    let lines = tracking.end(Signal::SIGTERM);
    let summary = lines.last().unwrap();
    assert_eq!(
        (lost(summary), &summary["complete"]),
        (vec!["ring_full"], &json!(true))
    );
    let events = told(&lines, pid);
    assert_eq!(replay(&events), [], "each that was told of was also closed");
}

/// The next change of this process's descriptor `fd`.
fn next_change(updates: &Subscription, fd: u32) -> (EventKind, Option<PathBuf>) {
    loop {
        // The reader opens descriptors of its own.
        if let Update::Fd(event) = updates.recv_timeout(patience()).expect("an update")
            && (event.fd.pid, event.fd.fd) == (std::process::id(), fd)
        {
            return (event.kind, event.fd.path.clone());
        }
    }
}

#[test]
fn the_library_turns_the_callers_own_descriptor_into_a_bypassed_one() {
    let bytes = content(7, 1 << 20);
    let rig = rig(|source| put(source, "clip", &bytes));
    rig.cache_whole(Path::new("clip")).unwrap();
    let clip = rig.mountpoint().join("clip");
    need_root();
    let tracker = Tracker::start(TrackerOptions::new(rig.mountpoint())).unwrap();
    let updates = tracker.subscribe();

    let file = File::open(&clip).unwrap();
    let (pid, fd) = (std::process::id(), file.as_raw_fd() as u32);
    tracker.flush().unwrap();
    let tracked = tracker.lookup(pid, fd).expect("a tracked descriptor");
    assert_eq!(
        (&tracked.path, tracked.size),
        (&Some(clip.clone()), 1 << 20)
    );
    assert_eq!(
        next_change(&updates, fd),
        (EventKind::Open, Some(clip.clone()))
    );
    assert!(tracker.entries().contains(&tracked));

    let bypassed = BypassFile::from_fd(OwnedFd::from(file)).unwrap();
    let mut read = vec![0; bytes.len()];
    assert_eq!(bypassed.read_at(&mut read, 0).unwrap(), bytes.len());
    assert!(read == bytes);
    assert_eq!(
        bypassed.stats().cache_bytes,
        1 << 20,
        "{:?}",
        bypassed.refusal()
    );

    drop(bypassed);
    tracker.flush().unwrap();
    assert_eq!(tracker.lookup(pid, fd), None);
    assert_eq!(next_change(&updates, fd), (EventKind::Close, Some(clip)));
    assert_eq!(tracker.losses().total(), 0);
    tracker.stop().unwrap();
    // A subscription ends with the tracking.
    while updates.recv().is_some() {}
}
