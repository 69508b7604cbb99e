//! The nodes against a model of the kernel's inodes: whatever changes, whoever
//! opens, and in whichever order the kernel comes to do what it was told, no open
//! is of a kind that it refuses, and no page is read as another version's.

use proptest::prelude::*;

use super::tests::{attr, edition};
use super::*;

const PATH: &str = "clip";

/// The clip as it is at the source.
#[derive(Debug, Clone, Copy)]
struct Clip {
    /// Its cache file, or its snapshot: which bytes it has.
    bytes: u64,
    seconds: u64,
    whole: bool,
    writable: bool,
}

impl Clip {
    fn attr(self) -> FileAttr {
        attr(7, 100, self.seconds)
    }

    fn edition(self) -> Edition {
        edition(Version::of_attr(&self.attr()), self.bytes)
    }
}

/// How the kernel was told to open a node.
#[derive(Debug, Clone)]
enum Way {
    Passthrough(u64),
    Cached {
        keep: bool,
        pages: Arc<Pages>,
        bytes: u64,
    },
    Direct,
}

#[derive(Debug, Clone)]
struct Open {
    node: u64,
    way: Way,
    /// Whether the kernel has come to do what it was told.
    finished: bool,
}

/// What the kernel has of a node: fs/fuse/iomode.c.
#[derive(Debug, Default)]
struct Inode {
    cached: u32,
    passed: u32,
    backing: Option<u64>,
    /// What its page is of, if it has one.
    page: Option<u64>,
}

struct World {
    clip: Clip,
    nodes: Nodes<()>,
    inodes: HashMap<u64, Inode>,
    opens: Vec<Open>,
    /// What the name was last found to be.
    entry: u64,
    /// The versions that the kernel was told of nodes, whenever it comes to note them.
    told: HashMap<u64, Vec<u64>>,
    refused: u32,
}

impl World {
    fn new() -> Self {
        let clip = Clip {
            bytes: 1,
            seconds: 1,
            whole: false,
            writable: false,
        };
        let mut nodes = Nodes::new();
        let entry = nodes.enter(Path::new(PATH), &clip.attr(), false);
        Self {
            clip,
            nodes,
            inodes: HashMap::new(),
            opens: Vec::new(),
            entry,
            told: HashMap::from([(entry, vec![1])]),
            refused: 0,
        }
    }

    fn try_open(&mut self, node: u64, last: bool) -> Option<Way> {
        let clip = self.clip;
        let version = Version::of_attr(&clip.attr());
        let mut admit = |version, wanted| {
            let back = || Ok::<_, ()>(());
            self.nodes.admit(node, version, wanted, back).unwrap()
        };
        if clip.writable {
            return match admit(None, Wanted::Direct) {
                Admission::Direct => Some(Way::Direct),
                _ => None,
            };
        }
        if clip.whole {
            let snapshot = SnapshotId {
                dev: 1,
                ino: clip.bytes,
            };
            match admit(Some(version), Wanted::Whole(snapshot)) {
                Admission::Whole(_) => return Some(Way::Passthrough(clip.bytes)),
                _ if !last => return None,
                _ => {}
            }
        }
        match admit(Some(version), Wanted::Ranges(clip.edition())) {
            Admission::Ranges { keep, pages } => Some(Way::Cached {
                keep,
                pages,
                bytes: clip.bytes,
            }),
            _ => None,
        }
    }

    fn tell(&mut self, node: u64, attr: &FileAttr) {
        let seconds = attr.mtime.duration_since(std::time::UNIX_EPOCH);
        let told = self.told.entry(node).or_default();
        told.push(seconds.unwrap().as_secs());
    }

    fn look_up(&mut self, alone: bool) {
        let attr = self.clip.attr();
        self.entry = self.nodes.enter(Path::new(PATH), &attr, alone);
        self.tell(self.entry, &attr);
    }

    fn open(&mut self, node: u64, way: Option<Way>) {
        let of_one = self.told[&node].iter().all(|t| *t == self.clip.seconds);
        assert!(
            of_one || matches!(way, None | Some(Way::Direct)),
            "the kernel may have another version's size"
        );
        match way {
            Some(way) => self.opens.push(Open {
                node,
                way,
                finished: false,
            }),
            None => self.refused += 1,
        }
    }

    /// By name, looked up again if need be: as open(2) does.
    fn open_by_name(&mut self) {
        let first = self.try_open(self.entry, false);
        if first.is_some() {
            return self.open(self.entry, first);
        }
        self.look_up(true);
        let second = self.try_open(self.entry, true);
        assert!(second.is_some(), "nothing changed in between");
        self.open(self.entry, second);
    }

    /// Through somebody's descriptor.
    fn open_again(&mut self, node: u64) {
        let way = self.try_open(node, false);
        let way = way.or_else(|| self.try_open(node, true));
        self.open(node, way);
    }

    /// The kernel comes to do what it was told.
    fn finish(&mut self, index: usize) {
        let open = &mut self.opens[index];
        open.finished = true;
        let inode = self.inodes.entry(open.node).or_default();
        match &open.way {
            Way::Passthrough(bytes) => {
                assert_eq!(inode.cached, 0, "ETXTBSY");
                assert!(inode.backing.is_none_or(|b| b == *bytes), "EBUSY");
                inode.backing = Some(*bytes);
                inode.passed += 1;
                inode.page = None;
            }
            Way::Cached { keep, .. } => {
                assert!(inode.backing.is_none(), "EINVAL");
                inode.cached += 1;
                if !keep {
                    inode.page = None;
                }
            }
            Way::Direct => {
                assert!(inode.backing.is_none(), "EINVAL");
                inode.page = None;
            }
        }
    }

    fn read(&mut self, index: usize) {
        let open = &self.opens[index];
        let inode = self.inodes.get_mut(&open.node).unwrap();
        match &open.way {
            Way::Passthrough(bytes) => assert_eq!(inode.backing, Some(*bytes)),
            Way::Cached { keep, pages, bytes } => {
                if inode.page.is_none() {
                    if !keep {
                        pages.were_dropped();
                    }
                    // Of a clip that has changed it is ESTALE.
                    inode.page = (self.clip.bytes == *bytes).then_some(*bytes);
                }
                assert!(inode.page.is_none_or(|page| page == *bytes), "a mixture");
            }
            // Mapped, whatever it is now.
            Way::Direct => inode.page = Some(self.clip.bytes),
        }
    }

    fn close(&mut self, index: usize) {
        let open = self.opens.swap_remove(index);
        let inode = self.inodes.get_mut(&open.node).unwrap();
        match open.way {
            Way::Passthrough(_) => {
                inode.passed -= 1;
                if inode.passed == 0 {
                    inode.backing = None;
                }
            }
            Way::Cached { .. } => inode.cached -= 1,
            Way::Direct => {}
        }
        self.nodes.close(open.node);
    }

    fn step(&mut self, what: u8, which: usize) {
        let finished = |finished| {
            let all = self.opens.iter().enumerate();
            let all: Vec<_> = all.filter(|(_, o)| o.finished == finished).collect();
            (!all.is_empty()).then(|| all[which % all.len()].0)
        };
        match what {
            0..4 => self.open_by_name(),
            4 => {
                if let Some(open) = finished(true) {
                    self.open_again(self.opens[open].node);
                }
            }
            5..9 => {
                if let Some(open) = finished(false) {
                    self.finish(open);
                }
            }
            9..13 => {
                if let Some(open) = finished(true) {
                    self.read(open);
                }
            }
            13..16 => {
                if let Some(open) = finished(true) {
                    self.close(open);
                }
            }
            16 => {
                self.clip.bytes += 1;
                self.clip.seconds += which as u64 % 2;
                self.clip.whole = which.is_multiple_of(3);
            }
            17 => self.clip.whole ^= true,
            18 => self.clip.writable ^= which.is_multiple_of(4),
            19 => self.look_up(false),
            // Answers of lookups that another makes, or of getattr.
            _ => {
                let id = self.entry;
                self.look_up(false);
                self.entry = id;
                if let Some(attr) = self.nodes.show(id, &self.clip.attr()) {
                    self.tell(id, &attr);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]
    #[test]
    fn no_open_is_refused_and_no_page_is_anothers(
        steps in prop::collection::vec((0_u8..22, 0_usize..100), 1..150)
    ) {
        let mut world = World::new();
        for (what, which) in steps {
            world.step(what, which);
        }
        while let Some(open) = world.opens.iter().position(|o| !o.finished) {
            world.finish(open);
        }
        while !world.opens.is_empty() {
            world.close(0);
        }
        prop_assert_eq!(world.nodes.frozen(world.entry), None);
    }
}
