//! Content in which every byte tells where it belongs.
//!
//! A file is a row of 16-byte cells. A cell is a small block cipher's output of
//! (file, version, index of the cell): whole cells can be decoded without any
//! list of versions, and single bytes of two versions differ nearly always, so
//! that a part of a cell can be judged by comparison.

use serde::{Deserialize, Serialize};

/// Bytes of a cell.
pub const CELL: usize = 16;
const MAGIC: u64 = 0x7ac5;

/// Whose bytes: a file's number, and the version in which they were written.
/// Versions are counted over all files of a mount, so that whatever comes to a
/// path later has a higher one, also by a rename.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Stamp {
    pub version: u32,
    pub file: u16,
}

/// A round function: the finaliser of splitmix64.
fn round(value: u64, key: u64) -> u64 {
    let mut x = value.wrapping_add(key.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The cell of this index.
pub fn cell(stamp: Stamp, index: u64) -> [u8; CELL] {
    let mut left = (MAGIC << 48) | (u64::from(stamp.file) << 32) | u64::from(stamp.version);
    let mut right = index;
    for key in 1..=4 {
        (left, right) = (right, left ^ round(right, key));
    }
    let mut bytes = [0; CELL];
    bytes[..8].copy_from_slice(&left.to_le_bytes());
    bytes[8..].copy_from_slice(&right.to_le_bytes());
    bytes
}

/// Whose cell this is, and its index; `None` where it is nobody's.
pub fn decode(bytes: [u8; CELL]) -> Option<(Stamp, u64)> {
    let value = u128::from_le_bytes(bytes);
    let (mut left, mut right) = (value as u64, (value >> 64) as u64);
    for key in (1..=4).rev() {
        (left, right) = (right ^ round(left, key), left);
    }
    let stamp = Stamp {
        version: left as u32,
        file: (left >> 32) as u16,
    };
    (left >> 48 == MAGIC).then_some((stamp, right))
}

/// The byte at an offset.
pub fn byte(stamp: Stamp, offset: u64) -> u8 {
    cell(stamp, offset / CELL as u64)[(offset % CELL as u64) as usize]
}

/// The bytes from an offset on.
pub fn content(stamp: Stamp, offset: u64, length: usize) -> Vec<u8> {
    let skip = (offset % CELL as u64) as usize;
    let mut bytes = Vec::with_capacity(skip + length + CELL);
    for index in offset / CELL as u64.. {
        if bytes.len() >= skip + length {
            break;
        }
        bytes.extend_from_slice(&cell(stamp, index));
    }
    bytes[skip..skip + length].to_vec()
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, b| format!("{text}{b:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp {
        version: 70_000,
        file: 3,
    };

    #[test]
    fn a_cell_tells_whose_it_is() {
        for index in [0, 1, 65_535, 1 << 40] {
            assert_eq!(decode(cell(STAMP, index)), Some((STAMP, index)));
        }
        assert_eq!(decode([0; CELL]), None);
        assert_eq!(
            decode(*b"sixteen bytes...."[..16].first_chunk().unwrap()),
            None
        );
    }

    #[test]
    fn a_damaged_cell_is_nobodys() {
        for at in 0..CELL {
            let mut bytes = cell(STAMP, 9);
            bytes[at] ^= 0x40;
            assert_ne!(decode(bytes), Some((STAMP, 9)));
        }
    }

    #[test]
    fn content_may_start_and_end_anywhere() {
        let all = content(STAMP, 0, 200);
        for (offset, length) in [(0, 0), (1, 15), (15, 2), (16, 16), (37, 100), (199, 1)] {
            let part = content(STAMP, offset, length);
            assert_eq!(part, all[offset as usize..offset as usize + length]);
        }
        assert_eq!(byte(STAMP, 37), all[37]);
    }

    #[test]
    fn versions_and_files_differ_in_nearly_every_byte() {
        let of = |version, file| content(Stamp { version, file }, 0, 1 << 16);
        let base = of(1, 1);
        for other in [of(2, 1), of(1, 2), base[1..].to_vec()] {
            let same = base.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(same < 400, "{same} of 65,536: chance is 256");
        }
    }
}
