use super::*;
use proptest::prelude::*;

fn spans() -> impl Strategy<Value = Vec<Span>> {
    prop::collection::vec((1u64..1000, 1u64..1000), 0..40).prop_map(|gaps| {
        let mut at = 0;
        gaps.iter()
            .map(|(gap, length)| {
                let start = at + gap;
                at = start + length;
                Span { start, end: at }
            })
            .collect()
    })
}

fn answers() -> impl Strategy<Value = Answer> {
    let reason = prop::sample::select(Reason::ALL);
    prop_oneof![
        (
            any::<[u64; 2]>(),
            any::<(i64, u32, bool)>(),
            spans(),
            0u32..99
        )
            .prop_map(
                |([token, size], (seconds, nanos, caches_reads), ranges, more)| Answer::Ranges {
                    token,
                    size,
                    modified: Timestamp { seconds, nanos },
                    caches_reads,
                    total: ranges.len() as u32 + more,
                    ranges,
                }
            ),
        (any::<u64>(), spans()).prop_map(|(token, ranges)| Answer::More { token, ranges }),
        any::<u64>().prop_map(|token| Answer::Valid { token }),
        (prop::sample::select(&WholeKind::ALL[..]), any::<u64>())
            .prop_map(|(kind, size)| Answer::Whole { kind, size }),
        (reason, ".{0,1500}")
            .prop_map(|(reason, detail)| { Answer::refused(&Refusal::new(reason, detail)) }),
    ]
}

fn requests() -> impl Strategy<Value = Request> {
    prop_oneof![
        any::<Option<u64>>().prop_map(|pulled| Request::Ranges {
            pulled: pulled.filter(|p| *p != NONE)
        }),
        Just(Request::Whole),
        any::<(u64, u64)>().prop_map(|(token, from)| Request::More { token, from }),
        any::<u64>().prop_map(|token| Request::Check { token }),
        any::<(u64, u64)>().prop_map(|(token, offset)| Request::Differs { token, offset }),
    ]
}

proptest! {
    #[test]
    fn messages_come_back(request in requests(), answer in answers()) {
        let bytes = request.encode();
        prop_assert_eq!(bytes.len(), REQUEST_BYTES);
        prop_assert_eq!(Request::parse(&bytes), Ok(request));
        let bytes = answer.encode();
        prop_assert!(bytes.len() <= ANSWER_BYTES);
        prop_assert_eq!(Answer::parse(&bytes), Ok(answer));
    }

    /// One bit, or a byte more or less, makes another message or none.
    #[test]
    fn a_changed_message_is_another_or_none(
        request in requests(),
        answer in answers(),
        at in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let mut bytes = request.encode();
        let place = at.index(bytes.len());
        bytes[place] ^= 1 << bit;
        prop_assert_ne!(Request::parse(&bytes), Ok(request));
        bytes[place] ^= 1 << bit;
        bytes.push(0);
        prop_assert!(Request::parse(&bytes).is_err());
        prop_assert!(Request::parse(&bytes[..place]).is_err());
        let mut bytes = answer.encode();
        let place = at.index(bytes.len());
        bytes[place] ^= 1 << bit;
        prop_assert_ne!(Answer::parse(&bytes), Ok(answer));
    }

    #[test]
    fn any_bytes_are_a_message_or_none(mut bytes: Vec<u8>, kind in 0u8..7) {
        let _ = (Request::parse(&bytes), Answer::parse(&bytes));
        let mut ours = begin(u16::from(kind));
        ours.append(&mut bytes);
        if let Ok(request) = Request::parse(&ours) {
            prop_assert_eq!(request.encode(), &ours[..]);
        }
        let _ = Answer::parse(&ours);
    }
}

#[test]
fn another_version_is_told_from_garbage() {
    let mut bytes = Request::Whole.encode();
    bytes[4] = 2;
    assert_eq!(Request::parse(&bytes), Err(Malformed::Version(2)));
    bytes[0] = b'x';
    assert_eq!(Request::parse(&bytes), Err(Malformed::Garbage));
    assert_eq!(Request::parse(&[]), Err(Malformed::Garbage));
}

#[test]
fn a_later_servers_reason_is_kept_as_text() {
    let header = Header {
        count: 5,
        ..Header::default()
    };
    let mut bytes = header.encode(5);
    bytes.extend(b"novelwhy");
    let Ok(Answer::Refused(refusal)) = Answer::parse(&bytes) else {
        panic!("no refusal");
    };
    assert_eq!(refusal, Refusal::new(Reason::Handover, "novel: why"));
}

#[test]
fn ten_thousand_ranges_come_in_parts() {
    let pairs: Vec<(u64, u64)> = (0..10_000).map(|i| (i * 10, 5)).collect();
    let ranges = Ranges::from_sorted(&pairs, u64::MAX).unwrap();
    let mut all = Vec::new();
    loop {
        let next = part(&ranges, all.len() as u64);
        if next.is_empty() {
            break;
        }
        let answer = Answer::More {
            token: 1,
            ranges: next.clone(),
        };
        assert_eq!(Answer::parse(&answer.encode()), Ok(answer));
        all.extend(next);
    }
    assert_eq!(all, ranges.spans());
    assert!(part(&ranges, u64::MAX).is_empty());
}
