//! Which gates a proof has passed, with the evidence: what `explain` shows.

use crate::cache::proof::Found;
use crate::reason::Refusal;

macro_rules! gates {
    ($($(#[$doc:meta])* $variant:ident = $name:literal;)*) => {
        /// A step of the proof. Names in `snake_case` are part of `explain`'s JSON.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Gate {
            $($(#[$doc])* $variant,)*
        }

        impl Gate {
            /// Every gate, in the order in which they are come to.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Its name, `snake_case`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

gates! {
    /// Nothing switches the bypass off.
    Enabled = "enabled";
    /// The descriptor cannot write.
    ReadOnlyOpen = "read_only_open";
    /// The file is on an `rclone mount`.
    Mount = "mount";
    /// The daemon and its cache folder are found.
    Daemon = "daemon";
    /// The mount is read-only, or the kernel shows enough of a writable one.
    Access = "access";
    /// No other rclone uses the same cache.
    NotShared = "not_shared";
    /// The metadata lists something, before rclone is asked.
    Cached = "cached";
    /// rclone has compared the remote's version with its own.
    Prime = "prime";
    /// The path leads to the file that was opened.
    Identity = "identity";
    /// The daemon's own cache file is found.
    DataFile = "data_file";
    /// The metadata is whole and stable.
    Metadata = "metadata";
    /// The cache's file system tells holes.
    FileSystem = "file_system";
    /// The cache file has one link.
    Links = "links";
    /// Nothing waits to be uploaded.
    Clean = "clean";
    /// All agree on the size.
    Size = "size";
    /// The metadata is of the version that FUSE shows.
    Version = "version";
    /// Something is cached.
    Ranges = "ranges";
    /// Nothing changed during the proof.
    Settled = "settled";
    /// No page waits to reach rclone.
    PageCache = "page_cache";
    /// A handover server has proven it, where the cache is not ours to see.
    Handover = "handover";
}

/// What a gate found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Which one.
    pub gate: Gate,
    /// Its evidence, or why it does not hold.
    pub found: Found,
}

/// Notes the gates of a proof, if anybody wants to know.
#[derive(Debug, Default)]
pub struct Trail(Option<Vec<Step>>);

impl Trail {
    /// Notes nothing.
    #[must_use]
    pub fn off() -> Self {
        Self(None)
    }

    /// Notes each step.
    #[must_use]
    pub fn on() -> Self {
        Self(Some(Vec::new()))
    }

    /// Notes what a gate found, and hands it back.
    ///
    /// # Errors
    /// Those of `found`.
    pub fn note(&mut self, gate: Gate, found: Found) -> Result<(), Refusal> {
        if let Some(steps) = &mut self.0
            && !steps.iter().any(|step| step.gate == gate)
        {
            let found = found.clone();
            steps.push(Step { gate, found });
        }
        found.map(drop)
    }

    /// Notes what came of a step, `evidence` telling how it looks if it holds.
    ///
    /// # Errors
    /// Those of `result`.
    pub fn step<T>(
        &mut self,
        gate: Gate,
        result: Result<T, Refusal>,
        evidence: impl FnOnce(&T) -> String,
    ) -> Result<T, Refusal> {
        if self.0.is_some() {
            let found = result.as_ref().map(evidence).map_err(Clone::clone);
            // The result itself is what is handed back.
            let _ = self.note(gate, found);
        }
        result
    }

    /// Notes a step only if it does not hold: another one tells of success.
    ///
    /// # Errors
    /// Those of `result`.
    pub fn failure<T>(&mut self, gate: Gate, result: Result<T, Refusal>) -> Result<T, Refusal> {
        result.inspect_err(|refusal| {
            // It is handed back by `inspect_err`.
            let _ = self.note(gate, Err(refusal.clone()));
        })
    }

    /// The steps, in the order in which they were come to.
    #[must_use]
    pub fn into_steps(self) -> Vec<Step> {
        self.0.unwrap_or_default()
    }
}
