//! rclone's metadata files, any bytes: parsed sanely, or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmafx_bypass::cache::rclone::parse_metadata;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(metadata) = parse_metadata(bytes) {
        let spans = metadata.ranges.spans();
        assert!(
            spans
                .iter()
                .all(|s| s.start < s.end && s.end <= metadata.size)
        );
        assert!(spans.windows(2).all(|s| s[0].end < s[1].start));
    }
});
