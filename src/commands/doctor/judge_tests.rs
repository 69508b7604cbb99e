//! Facts in, checks out.

use super::*;
use crate::commands::doctor::container;
use crate::commands::doctor::facts::{Assisted, Helper};

/// A host where all is well, as root.
fn well() -> Facts {
    Facts {
        place: Place::Host,
        program: "/usr/bin/vmafx-bypass".into(),
        is_root: true,
        capabilities: Capabilities::BPF
            | Capabilities::PERFMON
            | Capabilities::SYS_ADMIN
            | Capabilities::DAC_READ_SEARCH
            | Capabilities::SYS_PTRACE,
        no_new_privs: false,
        opt_in: OptIn::Yes,
        kernel: (6, 12),
        uid_map: "         0          0 4294967295\n".into(),
        lockdown: Some("[none] integrity confidentiality\n".into()),
        proc_options: "rw,relatime".into(),
        perf_event_paranoid: Some(2),
        ptrace_scope: Some(1),
        exec: Ok(Assisted {
            unassisted: None,
            no_new_privs: false,
        }),
        fuse: Ok(()),
        fusermount: Some(Helper {
            path: "/usr/bin/fusermount3".into(),
            set_uid_root: true,
        }),
        fuse_conf: "# user_allow_other\n".into(),
        propagation: "shared:1".into(),
        rclone: Ok("rclone v1.60.1-DEV".into()),
        server: None,
        descriptors: 1 << 20,
    }
}

/// The same as a user without any capability.
fn user() -> Facts {
    Facts {
        is_root: false,
        capabilities: Capabilities::NONE,
        ..well()
    }
}

/// The names of what does not pass, each of which has a remedy.
fn failed(facts: &Facts) -> Vec<&'static str> {
    let rows = judge(facts);
    for row in &rows {
        assert_eq!(row.pass, row.remedy.is_none(), "{row:?}");
        assert!(
            !row.detail.is_empty() && !row.needed_by.is_empty(),
            "{row:?}"
        );
    }
    rows.iter()
        .filter(|row| !row.pass)
        .map(|row| row.name)
        .collect()
}

fn told(facts: &Facts, name: &str) -> String {
    let rows = judge(facts);
    let row = rows.into_iter().find(|row| row.name == name).unwrap();
    row.remedy.unwrap()
}

#[test]
fn all_is_well_for_root_on_a_host() {
    assert!(failed(&well()).is_empty());
}

#[test]
fn each_fact_fails_its_own_check() {
    type Change = fn(&mut Facts);
    let cases: &[(Change, &[&str])] = &[
        (|f| f.opt_in = OptIn::Unset, &["opt_in"]),
        (|f| f.uid_map = "0 100000 65536".into(), &["user_namespace"]),
        (
            |f| f.lockdown = Some("none integrity [confidentiality]".into()),
            &["lockdown"],
        ),
        (
            |f| f.lockdown = Some("none [integrity] confidentiality".into()),
            &[],
        ),
        (|f| f.lockdown = None, &[]),
        (|f| f.ptrace_scope = Some(2), &[]),
        (|f| f.ptrace_scope = Some(3), &["ptrace_scope"]),
        (|f| f.proc_options = "rw,hidepid=2".into(), &[]),
        (
            |f| f.exec = Err("no such program".into()),
            &["seccomp_notify"],
        ),
        (|f| f.no_new_privs = true, &["set_uid_programs"]),
        (|f| f.fuse = Err("`/dev/fuse`: no".into()), &["fuse_device"]),
        (|f| f.kernel = (6, 8), &["fuse_passthrough"]),
        (|f| f.rclone = Ok("rclone v1.75.2".into()), &[]),
        (|f| f.rclone = Ok("rclone v1.76.0".into()), &["rclone"]),
        (|f| f.rclone = Ok("rclone v1.59.9".into()), &["rclone"]),
        (|f| f.rclone = Ok(String::new()), &["rclone"]),
        (
            |f| f.rclone = Err("no `rclone` in PATH".into()),
            &["rclone"],
        ),
        (|f| f.server = Some(("/s".into(), Ok(()))), &[]),
        (
            |f| f.server = Some(("/s".into(), Err("no answer".into()))),
            &["handover_server"],
        ),
        (|f| f.descriptors = 1024, &["descriptors"]),
        (|f| f.propagation = String::new(), &[]),
    ];
    for (index, (change, names)) in cases.iter().enumerate() {
        let mut facts = well();
        change(&mut facts);
        assert_eq!(failed(&facts), *names, "case {index}");
    }
}

#[test]
fn a_user_without_capabilities_is_told_the_command_that_gives_them() {
    assert_eq!(
        failed(&user()),
        [
            "cap_bpf",
            "cap_perfmon",
            "cap_dac_read_search",
            "cap_sys_ptrace",
            "user_allow_other",
            "fuse_passthrough",
            "cap_sys_admin",
        ]
    );
    let setcap =
        "setcap cap_dac_read_search,cap_sys_ptrace,cap_perfmon,cap_bpf+ep /usr/bin/vmafx-bypass";
    assert!(told(&user(), "cap_perfmon").contains(setcap));
    // Root has none that were not taken away.
    let root = Facts {
        is_root: true,
        ..user()
    };
    assert!(told(&root, "cap_bpf").contains("CapabilityBoundingSet=CAP_BPF"));
    // For tracking CAP_SYS_ADMIN is enough, as before Linux 5.8.
    let mut admin = user();
    admin.capabilities = Capabilities::SYS_ADMIN;
    assert_eq!(failed(&admin), ["cap_dac_read_search", "cap_sys_ptrace"]);
}

#[test]
fn what_only_users_need_fails_for_them_alone() {
    type Change = fn(&mut Facts);
    let cases: [(Change, &str); 6] = [
        (|f| f.perf_event_paranoid = Some(3), "perf_event_paranoid"),
        (|f| f.fusermount = None, "fusermount3"),
        (
            |f| f.fusermount.as_mut().unwrap().set_uid_root = false,
            "fusermount3",
        ),
        (|f| f.no_new_privs = true, "fusermount3"),
        (|f| f.proc_options = "rw,hidepid=invisible".into(), "proc"),
        (|f| f.ptrace_scope = Some(2), "ptrace_scope"),
    ];
    for (index, (change, name)) in cases.into_iter().enumerate() {
        for (mut facts, fails) in [(user(), true), (well(), false)] {
            change(&mut facts);
            assert_eq!(failed(&facts).contains(&name), fails, "case {index}");
        }
    }
    let mut facts = user();
    facts.fuse_conf = " user_allow_other \n".into();
    assert!(!failed(&facts).contains(&"user_allow_other"));
    facts.exec = Ok(Assisted {
        unassisted: None,
        no_new_privs: true,
    });
    assert!(failed(&facts).contains(&"set_uid_programs"));
}

#[test]
fn the_kill_switch_is_in_the_way_of_run_and_other_checks_are_not() {
    let mut facts = user();
    facts.opt_in = OptIn::Killed;
    facts.exec = Ok(Assisted {
        unassisted: Some("VMAFX_EBPF_BYPASS=0".into()),
        no_new_privs: false,
    });
    let needed: Vec<_> = judge(&facts).into_iter().filter(|row| row.needed).collect();
    assert_eq!((needed.len(), needed[0].name), (1, "opt_in"));
    assert!(told(&facts, "seccomp_notify").contains("unset VMAFX_EBPF_BYPASS"));
}

#[test]
fn what_is_in_the_way_of_exec_has_its_own_remedy() {
    let told_of = |place, why: &str| {
        let mut facts = well();
        facts.place = place;
        facts.exec = Err(why.into());
        told(&facts, "seccomp_notify")
    };
    let forbidden = "seccomp(2) is forbidden here; allow it in the container's seccomp profile";
    assert!(told_of(Place::Docker, forbidden).contains("seccomp=unconfined"));
    assert!(told_of(Place::Host, forbidden).contains("the profile"));
    let outer = "another supervisor already answers for this process";
    assert!(told_of(Place::Docker, outer).contains("outside"));
    assert!(told_of(Place::Host, "the kernel has no seccomp(2)").contains("5.15"));
    assert!(told_of(Place::Host, "something else").contains("mend"));
}

#[test]
fn in_a_container_the_remedy_is_how_to_start_it() {
    let mut facts = user();
    facts.propagation = String::new();
    facts.place = Place::Docker;
    assert!(told(&facts, "cap_bpf").contains("`--cap-add BPF`"));
    assert!(told(&facts, "mount_propagation").contains("rslave"));
    facts.place = Place::Kubernetes;
    assert!(told(&facts, "cap_sys_ptrace").contains("add: [SYS_PTRACE]"));
    assert_eq!(container::remedy(Place::Host, "cap_bpf"), None);
    assert_eq!(container::remedy(Place::Docker, "kernel"), None);
    // What is the container's own is not.
    assert!(told(&facts, "user_allow_other").contains("/etc/fuse.conf"));
}
