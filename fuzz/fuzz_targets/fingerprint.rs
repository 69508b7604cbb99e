//! Fingerprints, any text: what is taken for a time is one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmafx_bypass::cache::rclone::parse_metadata;

fuzz_target!(|text: &str| {
    let json = serde_json::json!({
        "ModTime": "", "ATime": "", "Size": 1, "Rs": null, "Fingerprint": text, "Dirty": false,
    });
    let metadata = parse_metadata(json.to_string().as_bytes()).expect("sane but for the text");
    if let Some(fingerprint) = metadata.fingerprint {
        let size = fingerprint.size.to_string();
        let field = text.split(',').next().expect("split gives one");
        // A plus sign and zeros in front are the same number.
        assert!(
            field.trim_start_matches('+').trim_start_matches('0') == size.trim_start_matches('0')
        );
        assert!(
            fingerprint
                .modified
                .is_none_or(|t| t.seconds >= 0 && t.nanos < 1_000_000_000)
        );
    }
});
