//! What the tests share: the libraries, built and installed, and a cached clip.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use bypass::rig::{Rig, RigOptions};

pub const CLIP: &str = "clip.y4m";
/// No multiple of anything.
pub const SIZE: usize = (3 << 20) + 123;

/// The workspace.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Runs a command that has to work, and shows what it said if not.
pub fn run(command: &mut Command) -> Output {
    let output = command.output();
    let output = output.unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    output
}

/// The folder with the libraries as cargo has built them. Cargo builds no
/// cdylib for an integration test by itself.
fn build() -> PathBuf {
    let mut command = Command::new(env!("CARGO"));
    command
        .current_dir(root())
        .args(["build", "--locked", "-p", env!("CARGO_PKG_NAME")])
        .arg("--message-format=json");
    // `cargo test --release`.
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let output = run(&mut command);
    let text = String::from_utf8(output.stdout).unwrap();
    let messages = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let mut files = messages
        .filter(|m| m["reason"] == "compiler-artifact" && m["target"]["kind"][0] == "cdylib")
        .flat_map(|m| m["filenames"].as_array().unwrap().clone())
        .map(|name| PathBuf::from(name.as_str().unwrap()));
    let shared = files.find(|f| f.extension().is_some_and(|e| e == "so"));
    shared.unwrap().parent().unwrap().to_path_buf()
}

/// The libraries as `make install-lib` installs them, under a prefix of their own.
pub struct Installed {
    folder: PathBuf,
}

impl Installed {
    fn new() -> Self {
        // It stays, but is one: nobody would remove a temporary folder.
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("installed");
        let _ = fs::remove_dir_all(&folder);
        let mut install = Command::new(root().join("scripts/install-lib.sh"));
        install.arg(build()).env("PREFIX", &folder);
        run(install.env_remove("DESTDIR").env_remove("LIBDIR"));
        Self { folder }
    }

    pub fn path(&self) -> &Path {
        &self.folder
    }

    pub fn lib(&self) -> PathBuf {
        self.path().join("lib")
    }

    /// What pkg-config says about the library.
    pub fn pkg_config(&self, arguments: &[&str]) -> Vec<String> {
        let mut command = Command::new("pkg-config");
        command.args(arguments).arg("vmafx_bypass");
        let output = run(command.env("PKG_CONFIG_PATH", self.lib().join("pkgconfig")));
        let text = String::from_utf8(output.stdout).unwrap();
        text.split_whitespace().map(str::to_owned).collect()
    }

    /// A command that finds the shared library.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env("LD_LIBRARY_PATH", self.lib())
            .env_remove("VMAFX_EBPF_BYPASS");
        command
    }

    /// Compiles a file of this package; `link`: what pkg-config is to be asked.
    pub fn compile(&self, compiler: &[&str], source: &str, link: &str) -> PathBuf {
        let name = format!("{}{link}", source.replace(['/', '.'], "-"));
        let program = self.path().join(name);
        let mut command = Command::new(compiler[0]);
        command
            .args(&compiler[1..])
            .args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-g", "-o"])
            .arg(&program)
            .args(self.pkg_config(&["--cflags"]))
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(source))
            .args(self.pkg_config(&[link]));
        run(&mut command);
        program
    }
}

/// One for all tests of a program.
pub fn installed() -> &'static Installed {
    static INSTALLED: OnceLock<Installed> = OnceLock::new();
    INSTALLED.get_or_init(Installed::new)
}

/// Bytes that tell where they are from: each 16 hold their offset.
pub fn content() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SIZE + 16);
    while bytes.len() < SIZE {
        bytes.extend_from_slice(format!("{:015x}\n", bytes.len()).as_bytes());
    }
    bytes.truncate(SIZE);
    bytes
}

/// A clip on a mount, and what it holds.
pub struct Clip {
    pub rig: Rig,
    pub path: PathBuf,
    pub copy: PathBuf,
}

impl Clip {
    /// On each rclone: PATH's, and a newer one if RCLONE_NEW names it.
    pub fn each(test: impl Fn(&Clip)) {
        let root = nix::unistd::geteuid().is_root();
        assert!(root, "this test needs root: run `make test`");
        test(&Self::on("rclone".into()));
        if let Some(newer) = std::env::var_os("RCLONE_NEW") {
            test(&Self::on(newer.into()));
        }
    }

    fn on(rclone: PathBuf) -> Self {
        // A newer rclone would write metadata for 5 seconds more.
        let newer = rclone.is_absolute();
        let options = RigOptions {
            rclone,
            mount_arguments: newer
                .then(|| "--vfs-handle-caching=0s".into())
                .into_iter()
                .collect(),
            ..RigOptions::default()
        };
        let rig = Rig::start(options, |source| fs::write(source.join(CLIP), content()));
        let rig = rig.expect("rclone must serve and mount");
        Self {
            path: rig.mountpoint().join(CLIP),
            copy: rig.source().join(CLIP),
            rig,
        }
    }

    /// Has it cached whole. rclone writes metadata, which ends a proof, when the
    /// first opens a clip and when the last closes it: not while this is held.
    pub fn cache(&self) -> File {
        self.rig.cache_whole(CLIP.as_ref()).unwrap();
        let held = File::open(&self.path).unwrap();
        held.read_exact_at(&mut [0], 0).unwrap();
        held
    }
}
