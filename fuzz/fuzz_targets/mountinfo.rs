//! The mount table, any bytes: every mount's paths lead back to themselves.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmafx_bypass::mounts::{MountTable, split_source};

fuzz_target!(|bytes: &[u8]| {
    let table = MountTable::parse(bytes);
    for mount in table.iter() {
        let _ = split_source(&mount.source);
        let _ = table.containing(&mount.point);
        let inside = mount.inside(&mount.point).expect("a point is below itself");
        assert_eq!(
            mount.outside(&inside).as_deref(),
            Some(mount.point.as_path())
        );
    }
});
