//! Handover messages, any bytes: what parses has one form, and is sane.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmafx_bypass::handover::protocol::{Answer, MAX_RANGES, RANGES_PER_ANSWER, Request};
use vmafx_bypass::Reason;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(request) = Request::parse(bytes) {
        assert_eq!(request.encode(), bytes);
    }
    match Answer::parse(bytes) {
        // A reason that we do not know has become text.
        Ok(Answer::Refused(refusal)) => {
            assert!(refusal.detail.len() <= 1024 && !refusal.detail.contains('\n'));
            if refusal.reason != Reason::Handover {
                assert_eq!(Answer::Refused(refusal).encode(), bytes);
            }
        }
        Ok(answer) => {
            assert_eq!(answer.encode(), bytes);
            if let Answer::Ranges { total, ranges, .. } = &answer {
                assert!(*total as usize <= MAX_RANGES && ranges.len() <= RANGES_PER_ANSWER);
            }
            if let Answer::Ranges { ranges, .. } | Answer::More { ranges, .. } = answer {
                assert!(ranges.iter().all(|s| s.start < s.end));
                assert!(ranges.windows(2).all(|s| s[0].end < s[1].start));
            }
        }
        Err(_) => {}
    }
});
