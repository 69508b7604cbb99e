//! Pixels of a screenshot.

use std::io::Cursor;

pub type Colour = [u8; 3];

pub struct Picture {
    width: usize,
    pixels: Vec<Colour>,
}

/// WCAG's, from 0 for black to 1 for white.
pub fn luminance(colour: Colour) -> f64 {
    let linear = colour.map(|channel| {
        let share = f64::from(channel) / 255.0;
        if share <= 0.04045 {
            share / 12.92
        } else {
            ((share + 0.055) / 1.055).powf(2.4)
        }
    });
    0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
}

/// WCAG's, from 1 to 21.
pub fn contrast(one: Colour, other: Colour) -> f64 {
    let (one, other) = (luminance(one), luminance(other));
    (one.max(other) + 0.05) / (one.min(other) + 0.05)
}

impl Picture {
    pub fn of(bytes: &[u8]) -> Self {
        let mut reader = png::Decoder::new(Cursor::new(bytes)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!(info.bit_depth, png::BitDepth::Eight);
        let samples = info.color_type.samples();
        assert!(samples >= 3, "{info:?}");
        Self {
            width: info.width as usize,
            pixels: pixels
                .chunks_exact(samples)
                .map(|pixel| [pixel[0], pixel[1], pixel[2]])
                .collect(),
        }
    }

    pub fn at(&self, x: f64, y: f64) -> Colour {
        self.pixels[y as usize * self.width + x as usize]
    }

    /// The pixels of a box: left, top, right and bottom.
    pub fn within(&self, [left, top, right, bottom]: [f64; 4]) -> impl Iterator<Item = Colour> {
        let rows = self.pixels.chunks(self.width);
        rows.take(bottom as usize)
            .skip(top as usize)
            .flat_map(move |row| row[left as usize..right as usize].iter().copied())
    }

    /// The page's margin, from top to bottom.
    pub fn margin(&self) -> impl Iterator<Item = Colour> {
        self.pixels.chunks(self.width).map(|row| row[2])
    }

    /// Which share of the pixels is well told from `back`.
    pub fn share_told_from(&self, back: Colour) -> f64 {
        let told = self
            .pixels
            .iter()
            .filter(|pixel| **pixel != back && contrast(**pixel, back) >= 4.5);
        told.count() as f64 / self.pixels.len() as f64
    }
}
