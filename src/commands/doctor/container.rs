//! Containers: whether this is one, and how it is to be started.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Where the program runs, as far as remedies differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Host,
    /// Docker or Podman: they take the same options.
    Docker,
    Kubernetes,
}

impl Place {
    /// By the marks that they leave.
    pub fn find() -> Self {
        let marks = ["/.dockerenv", "/run/.containerenv"];
        if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() {
            Self::Kubernetes
        } else if marks.iter().any(|mark| Path::new(mark).exists()) && !has_init_s_mounts() {
            Self::Docker
        } else {
            Self::Host
        }
    }
}

/// Whether this is the mount namespace of the first process of all: a machine whose
/// files were made from a container's has the mark, too.
fn has_init_s_mounts() -> bool {
    // include/uapi/linux/nsfs.h; of mount namespaces the first one has it from
    // Linux 6.18 on.
    const FIRST_PID: u64 = 0xefff_fffc;
    const FIRST_MNT: u64 = 0xefff_fff8;
    let inode = |path: &str| fs::metadata(path).map(|found| found.ino()).ok();
    let own = inode("/proc/self/ns/mnt");
    own == Some(FIRST_MNT)
        || (inode("/proc/self/ns/pid") == Some(FIRST_PID)
            && own.is_some()
            && own == inode("/proc/1/ns/mnt"))
}

/// What containers are to be started with: the name of a check, Docker's option (and
/// Podman's), and the setting of a Kubernetes pod.
const CONTAINERS: &[(&str, &str, &str)] = &[
    (
        "rights",
        "--cap-add BPF --cap-add PERFMON",
        "securityContext.capabilities.add: [BPF, PERFMON]",
    ),
    (
        "cap_bpf",
        "--cap-add BPF",
        "securityContext.capabilities.add: [BPF]",
    ),
    (
        "cap_perfmon",
        "--cap-add PERFMON",
        "securityContext.capabilities.add: [PERFMON]",
    ),
    (
        "cap_dac_read_search",
        "--cap-add DAC_READ_SEARCH",
        "securityContext.capabilities.add: [DAC_READ_SEARCH]",
    ),
    (
        "cap_sys_ptrace",
        "--cap-add SYS_PTRACE",
        "securityContext.capabilities.add: [SYS_PTRACE]",
    ),
    (
        "cap_sys_admin",
        "--cap-add SYS_ADMIN",
        "securityContext.capabilities.add: [SYS_ADMIN]",
    ),
    (
        "bpf_fs",
        "-v /sys/fs/bpf:/sys/fs/bpf",
        "a hostPath volume of /sys/fs/bpf",
    ),
    (
        "tracefs",
        "-v /sys/kernel/tracing:/sys/kernel/tracing",
        "a hostPath volume of /sys/kernel/tracing",
    ),
    ("pid_namespace", "--pid=host", "hostPID: true"),
    (
        "seccomp_notify",
        "--security-opt seccomp=unconfined",
        "securityContext.seccompProfile.type: Unconfined",
    ),
    (
        "fuse_device",
        "--device /dev/fuse",
        "securityContext.privileged: true, or a device plugin for /dev/fuse",
    ),
    (
        "mount_propagation",
        "-v /mnt:/mnt:rslave",
        "mountPropagation: HostToContainer",
    ),
    (
        "descriptors",
        "--ulimit nofile=16384:16384",
        "LimitNOFILE=16384 of the node's container runtime",
    ),
];

/// The remedy where the program runs in a container; `None`: the host's will do.
pub fn remedy(place: Place, name: &str) -> Option<String> {
    let (_, docker, kubernetes) = CONTAINERS.iter().find(|(known, ..)| *known == name)?;
    match place {
        Place::Host => None,
        Place::Docker => Some(format!("start the container with `{docker}`")),
        Place::Kubernetes => Some(format!("give the pod `{kubernetes}`")),
    }
}
