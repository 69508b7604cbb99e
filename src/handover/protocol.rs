//! The messages, pure: one packet each, of fixed or bounded size.
//!
//! All numbers are little-endian. A message has exactly one form: what parses
//! encodes to the same bytes again. docs/HANDOVER.md has the layout.

use crate::cache::proof::Timestamp;
use crate::cache::ranges::{Ranges, Span};
use crate::reason::{Reason, Refusal};

/// The version of the messages; another one's are answered with a refusal.
pub const VERSION: u16 = 1;
const MAGIC: [u8; 4] = *b"vbho";

/// A request's size, bytes.
pub const REQUEST_BYTES: usize = 32;
/// Ranges in one answer; further ones are asked for.
pub const RANGES_PER_ANSWER: usize = 1024;
/// Ranges of one clip, at most; 100,000 make metadata of 6 MB.
pub const MAX_RANGES: usize = 1 << 20;
const HEADER: usize = 48;
const RANGE: usize = 16;
/// Bytes of a refusal's detail; what is longer is cut.
const MAX_DETAIL: usize = 1024;
/// An answer's size, at most, bytes.
pub const ANSWER_BYTES: usize = HEADER + RANGE * RANGES_PER_ANSWER;

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// The cache file and its proven ranges. With the clip's descriptor.
    Ranges {
        /// An offset that the client has read through FUSE already.
        pulled: Option<u64>,
    },
    /// A file that has the whole clip and never changes. With the descriptor.
    Whole,
    /// The ranges from this index on.
    More {
        /// Of the answer with the first ones.
        token: u64,
        /// How many the client has.
        from: u64,
    },
    /// Whether the proof still holds, but for what the client sees by itself.
    Check {
        /// Of the answer with the ranges.
        token: u64,
    },
    /// The client has found another byte than FUSE's. With the descriptor.
    Differs {
        /// Of the answer with the ranges.
        token: u64,
        /// Where.
        offset: u64,
    },
}

/// Why a packet is no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Another version of this protocol.
    #[error("version {0} of the handover protocol, not {VERSION}")]
    Version(u16),
    /// Not of this protocol.
    #[error("not a message of the handover protocol")]
    Garbage,
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Malformed> {
    let field = bytes.get(at..at + N).ok_or(Malformed::Garbage)?;
    field.try_into().map_err(|_| Malformed::Garbage)
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, Malformed> {
    number(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, Malformed> {
    number(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, Malformed> {
    number(bytes, at).map(u64::from_le_bytes)
}

/// The kind of a message of our version.
fn kind(bytes: &[u8]) -> Result<u16, Malformed> {
    if number(bytes, 0)? != MAGIC {
        return Err(Malformed::Garbage);
    }
    match u16_at(bytes, 4)? {
        VERSION => u16_at(bytes, 6),
        other => Err(Malformed::Version(other)),
    }
}

fn begin(kind: u16) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes
}

/// Stands for no offset.
const NONE: u64 = u64::MAX;

impl Request {
    /// Whether the clip's descriptor comes with it; rclone may then be asked,
    /// and so the answer may take long.
    #[must_use]
    pub fn has_descriptor(self) -> bool {
        matches!(
            self,
            Self::Ranges { .. } | Self::Whole | Self::Differs { .. }
        )
    }

    fn fields(self) -> (u16, u64, u64) {
        match self {
            Self::Ranges { pulled } => (1, 0, pulled.unwrap_or(NONE)),
            Self::Whole => (2, 0, 0),
            Self::More { token, from } => (3, token, from),
            Self::Check { token } => (4, token, 0),
            Self::Differs { token, offset } => (5, token, offset),
        }
    }

    /// The packet.
    #[must_use]
    pub fn encode(self) -> Vec<u8> {
        let (kind, token, argument) = self.fields();
        let mut bytes = begin(kind);
        bytes.extend(token.to_le_bytes());
        bytes.extend(argument.to_le_bytes());
        bytes.resize(REQUEST_BYTES, 0);
        bytes
    }

    /// # Errors
    /// [`Malformed`], unless it is exactly what [`encode`](Self::encode) gives.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let kind = kind(bytes)?;
        let (token, argument) = (u64_at(bytes, 8)?, u64_at(bytes, 16)?);
        let request = match kind {
            1 => Self::Ranges {
                pulled: (argument != NONE).then_some(argument),
            },
            2 => Self::Whole,
            3 => Self::More {
                token,
                from: argument,
            },
            4 => Self::Check { token },
            5 => Self::Differs {
                token,
                offset: argument,
            },
            _ => return Err(Malformed::Garbage),
        };
        if request.encode() == bytes {
            Ok(request)
        } else {
            Err(Malformed::Garbage)
        }
    }
}

/// What kind of file has the whole clip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WholeKind {
    /// It shares the cache file's blocks.
    Reflink,
    /// A sealed copy in memory.
    Copy,
    /// The cache file itself, which may still change.
    Live,
}

impl WholeKind {
    const ALL: [Self; 3] = [Self::Reflink, Self::Copy, Self::Live];

    /// Its name, `snake_case`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Reflink => "reflink",
            Self::Copy => "copy",
            Self::Live => "live",
        }
    }
}

/// What the server says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// To [`Request::Ranges`], with the cache file's descriptor.
    Ranges {
        /// Names the proof in later requests on this connection.
        token: u64,
        /// The clip's size, bytes.
        size: u64,
        /// Its modification time.
        modified: Timestamp,
        /// Whether all that is read through FUSE goes into the cache file.
        caches_reads: bool,
        /// How many ranges there are.
        total: u32,
        /// The first of them.
        ranges: Vec<Span>,
    },
    /// To [`Request::More`].
    More {
        /// As asked.
        token: u64,
        /// The next ranges.
        ranges: Vec<Span>,
    },
    /// To [`Request::Check`] and [`Request::Differs`]: the proof holds.
    Valid {
        /// As asked.
        token: u64,
    },
    /// To [`Request::Whole`], with the descriptor.
    Whole {
        /// What the descriptor is of.
        kind: WholeKind,
        /// The clip's size, bytes.
        size: u64,
    },
    /// To any request: no.
    Refused(Refusal),
}

/// Whether spans are sorted, apart from each other, and not empty.
fn are_sane(spans: &[Span]) -> bool {
    spans.iter().all(|s| s.start < s.end) && spans.windows(2).all(|s| s[0].end < s[1].start)
}

/// An answer's fields between its kind and what follows them.
#[derive(Default)]
struct Header {
    token: u64,
    size: u64,
    modified: Option<Timestamp>,
    flags: u32,
    total: u32,
    count: u32,
}

impl Header {
    fn encode(&self, kind: u16) -> Vec<u8> {
        let (seconds, nanos) = self.modified.map_or((0, 0), |m| (m.seconds, m.nanos));
        let mut bytes = begin(kind);
        bytes.extend(self.token.to_le_bytes());
        bytes.extend(self.size.to_le_bytes());
        bytes.extend(seconds.to_le_bytes());
        bytes.extend(nanos.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.total.to_le_bytes());
        bytes.extend(self.count.to_le_bytes());
        bytes
    }
}

fn encode_spans(mut bytes: Vec<u8>, spans: &[Span]) -> Vec<u8> {
    for span in spans {
        bytes.extend(span.start.to_le_bytes());
        bytes.extend(span.end.to_le_bytes());
    }
    bytes
}

fn parse_spans(bytes: &[u8], count: u32) -> Result<Vec<Span>, Malformed> {
    if count as usize > RANGES_PER_ANSWER || bytes.len() != HEADER + RANGE * count as usize {
        return Err(Malformed::Garbage);
    }
    let spans: Vec<Span> = (HEADER..bytes.len())
        .step_by(RANGE)
        .map(|at| {
            Ok(Span {
                start: u64_at(bytes, at)?,
                end: u64_at(bytes, at + 8)?,
            })
        })
        .collect::<Result<_, Malformed>>()?;
    if are_sane(&spans) {
        Ok(spans)
    } else {
        Err(Malformed::Garbage)
    }
}

/// The longest start of a text that is no longer than `limit` bytes.
fn cut(text: &str, limit: usize) -> &str {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

impl Answer {
    /// A refusal in a form that goes into one packet, and on one line.
    #[must_use]
    pub fn refused(refusal: &Refusal) -> Self {
        let line: String = refusal
            .detail
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        Self::Refused(Refusal::new(refusal.reason, cut(&line, MAX_DETAIL)))
    }

    /// The packet. Of ranges there are at most [`RANGES_PER_ANSWER`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Ranges {
                token,
                size,
                modified,
                caches_reads,
                total,
                ranges,
            } => {
                let header = Header {
                    token: *token,
                    size: *size,
                    modified: Some(*modified),
                    flags: u32::from(*caches_reads),
                    total: *total,
                    count: ranges.len() as u32,
                };
                encode_spans(header.encode(1), ranges)
            }
            Self::Whole { kind, size } => Header {
                size: *size,
                flags: *kind as u32,
                ..Header::default()
            }
            .encode(2),
            Self::More { token, ranges } => {
                let header = Header {
                    token: *token,
                    count: ranges.len() as u32,
                    ..Header::default()
                };
                encode_spans(header.encode(3), ranges)
            }
            Self::Valid { token } => Header {
                token: *token,
                ..Header::default()
            }
            .encode(4),
            Self::Refused(refusal) => {
                let name = refusal.reason.name();
                let header = Header {
                    count: name.len() as u32,
                    ..Header::default()
                };
                let mut bytes = header.encode(5);
                bytes.extend(name.as_bytes());
                bytes.extend(cut(&refusal.detail, MAX_DETAIL).as_bytes());
                bytes
            }
        }
    }

    /// # Errors
    /// [`Malformed`], unless it is exactly what [`encode`](Self::encode) gives.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let kind = kind(bytes)?;
        let (token, size) = (u64_at(bytes, 8)?, u64_at(bytes, 16)?);
        let (flags, total) = (u32_at(bytes, 36)?, u32_at(bytes, 40)?);
        let count = u32_at(bytes, 44)?;
        let answer = match kind {
            1 => Self::Ranges {
                token,
                size,
                modified: Timestamp {
                    seconds: number(bytes, 24).map(i64::from_le_bytes)?,
                    nanos: u32_at(bytes, 32)?,
                },
                caches_reads: flags == 1,
                total,
                ranges: parse_spans(bytes, count)?,
            },
            2 => Self::Whole {
                kind: *WholeKind::ALL
                    .get(flags as usize)
                    .ok_or(Malformed::Garbage)?,
                size,
            },
            3 => Self::More {
                token,
                ranges: parse_spans(bytes, count)?,
            },
            4 => Self::Valid { token },
            5 => return parse_refusal(bytes, count),
            _ => return Err(Malformed::Garbage),
        };
        let is_sane = match &answer {
            Self::Ranges { total, ranges, .. } => {
                *total as usize <= MAX_RANGES && ranges.len() <= *total as usize
            }
            _ => true,
        };
        if is_sane && answer.encode() == bytes {
            Ok(answer)
        } else {
            Err(Malformed::Garbage)
        }
    }
}

fn parse_refusal(bytes: &[u8], count: u32) -> Result<Answer, Malformed> {
    let text = std::str::from_utf8(&bytes[HEADER..]).map_err(|_| Malformed::Garbage)?;
    let split = text.split_at_checked(count as usize);
    let (name, detail) = split.ok_or(Malformed::Garbage)?;
    let is_one_line = !text.chars().any(char::is_control);
    if !is_one_line || detail.len() > MAX_DETAIL {
        return Err(Malformed::Garbage);
    }
    let known = Reason::ALL.iter().find(|reason| reason.name() == name);
    let answer = match known {
        Some(reason) => Answer::Refused(Refusal::new(*reason, detail)),
        // A later server's.
        None => return Ok(unknown(name, detail)),
    };
    if answer.encode() == bytes {
        Ok(answer)
    } else {
        Err(Malformed::Garbage)
    }
}

fn unknown(name: &str, detail: &str) -> Answer {
    let text = format!("{name}: {detail}");
    Answer::Refused(Refusal::new(Reason::Handover, cut(&text, MAX_DETAIL)))
}

/// The ranges of one answer, from an index on.
#[must_use]
pub fn part(ranges: &Ranges, from: u64) -> Vec<Span> {
    let spans = ranges.spans();
    let from = usize::try_from(from).map_or(spans.len(), |from| from.min(spans.len()));
    let end = (from + RANGES_PER_ANSWER).min(spans.len());
    spans[from..end].to_vec()
}

#[cfg(test)]
mod tests;
