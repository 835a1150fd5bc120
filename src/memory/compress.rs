//! Compression of a batch's data: none, lz4, zstd, or the one of these that gets most bytes through the link.
//!
//! Compressing pays while the compressor is faster than what it saves the link. [`choose`] decides that from three measured
//! numbers and is pure; [`Compressor`] measures two of them (speed and ratio, on small samples now and then) and is told
//! the third, the link's rate. Data that does not shrink is sent as it is, and after a few such batches not even tried.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::batch::{HEADER, Header, MAX_BATCH};
pub use crate::migrate::tuning::Compression;

/// How the data of one payload is stored. The numbers are the wire format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    None = 0,
    /// An lz4 block.
    Lz4 = 1,
    /// A zstd frame.
    Zstd = 2,
}

impl Codec {
    /// The codec with this number on the wire.
    pub fn from_wire(n: u8) -> Option<Codec> {
        [Codec::None, Codec::Lz4, Codec::Zstd].into_iter().find(|c| *c as u8 == n)
    }
}

/// How a codec does on the memory at hand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Plain bytes per second of one core.
    pub speed: f64,
    /// Compressed size by plain size.
    pub ratio: f64,
}

/// The codec that gets most plain bytes through a link of `link` bytes per second. Compressing runs beside sending, so the
/// slower of the two counts; it has to gain a fifth to be worth its processor time.
pub fn choose(link: f64, lz4: Option<Sample>, zstd: Option<Sample>) -> Codec {
    let through = |s: Sample| s.speed.min(link / s.ratio.max(0.001));
    let mut best = (Codec::None, link * 1.2);
    for (codec, sample) in [(Codec::Lz4, lz4), (Codec::Zstd, zstd)] {
        if let Some(sample) = sample.filter(|s| through(*s) > best.1) {
            best = (codec, through(sample));
        }
    }
    best.0
}

/// Data of this size or less is not worth the calls, in bytes.
const SMALL: usize = 1024;
/// What must at least be saved, by plain size, for compressed data to be sent.
const WORTH: f64 = 0.95;
/// Plain bytes between two samples.
const RESAMPLE: usize = 32 << 20;
/// A sample's size, in bytes.
const SAMPLE: usize = 64 << 10;

/// How fast the link takes bytes, by who sends them: shared with the [`Compressor`], which may be in another thread.
#[derive(Clone, Debug, Default)]
pub struct Meter(Arc<Mutex<Measure>>);

#[derive(Debug, Default)]
struct Measure {
    bytes: f64,
    seconds: f64,
    rate: Option<f64>,
}

/// Bytes after which the link's rate is taken anew. Less would measure the socket's buffer.
const MEASURE: f64 = (16 << 20) as f64;

impl Meter {
    /// `bytes` of frames were sent, which took the sender this long.
    pub fn sent(&self, bytes: usize, took: Duration) {
        let mut m = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        m.bytes += bytes as f64;
        m.seconds += took.as_secs_f64();
        if m.bytes >= MEASURE || m.seconds > 0.25 {
            let new = m.bytes / m.seconds.max(1e-9);
            m.rate = Some(m.rate.map_or(new, |old| (old + new) / 2.0));
            (m.bytes, m.seconds) = (0.0, 0.0);
        }
    }

    /// Bytes per second, when enough was sent to tell.
    pub fn rate(&self) -> Option<f64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).rate
    }
}

/// Compresses payloads; one for the whole migration, so that what it measured stays.
pub struct Compressor {
    compression: Compression,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    meter: Meter,
    limit: Option<f64>,
    samples: [Option<Sample>; 2],
    chosen: Codec,
    until_sample: usize,
    /// Batches in a row that did not shrink, and how many to leave alone now.
    hopeless: u32,
    skip: u32,
    spare: Vec<u8>,
}

impl Compressor {
    /// Compresses as the operator asked.
    pub fn new(compression: Compression) -> Compressor {
        let chosen = match compression {
            Compression::Lz4 => Codec::Lz4,
            Compression::Zstd => Codec::Zstd,
            Compression::None | Compression::Auto => Codec::None,
        };
        Compressor {
            compression,
            zstd: None,
            meter: Meter::default(),
            limit: None,
            samples: [None; 2],
            chosen,
            until_sample: 0,
            hopeless: 0,
            skip: 0,
            spare: Vec::new(),
        }
    }

    /// The operator's `--bandwidth`, bytes per second: the link is taken to be no faster.
    pub fn limit(&mut self, bytes_per_second: u64) {
        self.limit = (bytes_per_second > 0).then_some(bytes_per_second as f64);
    }

    /// Whom to tell how fast bytes get away. Until enough were sent, and no limit is set, `auto` does not compress.
    pub fn meter(&self) -> Meter {
        self.meter.clone()
    }

    fn link(&self) -> Option<f64> {
        let rate = self.meter.rate().or(self.limit)?;
        Some(self.limit.map_or(rate, |limit| rate.min(limit)))
    }

    /// What the next payload is compressed with.
    pub fn codec(&self) -> Codec {
        self.chosen
    }

    /// A payload of [`super::batch::Builder`], compressed if that makes it smaller. Its runs stay as they are.
    ///
    /// # Panics
    /// If it is no such payload.
    pub fn pack(&mut self, payload: Vec<u8>) -> Vec<u8> {
        let header = Header::read(&payload).expect("a payload of Builder");
        assert_eq!(header.codec, Codec::None, "packed twice");
        if header.plain <= SMALL || self.compression == Compression::None {
            return payload;
        }
        let data = &payload[HEADER..HEADER + header.plain];
        if self.compression == Compression::Auto {
            self.sample(data);
        }
        if self.chosen == Codec::None {
            return payload;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return payload;
        }
        // an earlier payload, whose bytes are overwritten: filling it with zeros first would cost a tenth of lz4's time
        let mut out = std::mem::take(&mut self.spare);
        let most = (header.plain as f64 * WORTH) as usize;
        let stored = self.compress(self.chosen, data, &mut out).filter(|n| *n <= most);
        let Some(stored) = stored else {
            self.hopeless = (self.hopeless + 1).min(6);
            // two bad batches may be chance; then 4, 8, 16 .. 64 in a row are believed to be the same
            self.skip = if self.hopeless >= 2 { 1 << self.hopeless } else { 0 };
            self.spare = out;
            return payload;
        };
        self.hopeless = 0;
        out.truncate(HEADER + stored);
        out[..HEADER].copy_from_slice(&payload[..HEADER]);
        out.extend_from_slice(&payload[HEADER + header.plain..]);
        out[1] = self.chosen as u8;
        out[20..24].copy_from_slice(&(stored as u32).to_le_bytes());
        self.spare = payload;
        out
    }

    /// Puts compressed `data` into `out` where a payload has it, and makes `out` long enough; its length, none if it does not
    /// shrink or the codec failed.
    fn compress(&mut self, codec: Codec, data: &[u8], out: &mut Vec<u8>) -> Option<usize> {
        let room = match codec {
            Codec::None => return None,
            Codec::Lz4 => lz4_flex::block::get_maximum_output_size(data.len()),
            // no more than it may have: zstd stops early
            Codec::Zstd => data.len(),
        };
        if out.len() < HEADER + room {
            out.resize(HEADER + room, 0);
        }
        let to = &mut out[HEADER..HEADER + room];
        match codec {
            Codec::None => None,
            Codec::Lz4 => lz4_flex::block::compress_into(data, to).ok(),
            Codec::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = zstd::bulk::Compressor::new(1).ok();
                }
                self.zstd.as_mut()?.compress_to_buffer(data, to).ok()
            }
        }
    }

    /// Measures both codecs on a piece of `data`, if it is time, and decides anew.
    fn sample(&mut self, data: &[u8]) {
        let Some(link) = self.link() else { return };
        if self.until_sample > data.len() {
            self.until_sample -= data.len();
            return;
        }
        self.until_sample = RESAMPLE;
        let from = (data.len() - data.len().min(SAMPLE)) / 2;
        let piece = &data[from..from + data.len().min(SAMPLE)];
        let mut out = std::mem::take(&mut self.spare);
        for (n, codec) in [Codec::Lz4, Codec::Zstd].into_iter().enumerate() {
            let start = Instant::now();
            let len = self.compress(codec, piece, &mut out);
            let took = start.elapsed().max(Duration::from_micros(1)).as_secs_f64();
            let new = Sample {
                speed: piece.len() as f64 / took,
                ratio: len.map_or(1.0, |n| n as f64 / piece.len() as f64).min(1.0),
            };
            // one piece may be odd: half of what was known stays
            self.samples[n] = Some(self.samples[n].map_or(new, |old| Sample {
                speed: (old.speed + new.speed) / 2.0,
                ratio: (old.ratio + new.ratio) / 2.0,
            }));
        }
        self.spare = out;
        self.chosen = choose(link, self.samples[0], self.samples[1]);
    }
}

/// Decompresses exactly `plain` bytes into `scratch`, whose memory is used again and never grows beyond [`MAX_BATCH`].
///
/// # Errors
/// The data is damaged, or has another length.
pub(super) fn decompress<'a>(
    codec: Codec,
    stored: &[u8],
    plain: usize,
    scratch: &'a mut Vec<u8>,
) -> Result<&'a [u8]> {
    ensure!(plain <= MAX_BATCH, "a batch of {plain} bytes");
    if scratch.len() < plain {
        scratch.reserve_exact(plain - scratch.len());
        scratch.resize(plain, 0);
    }
    let out = &mut scratch[..plain];
    let got = match codec {
        Codec::None => bail!("data that is not compressed"),
        Codec::Lz4 => lz4_flex::block::decompress_into(stored, out).context("lz4 data of a batch")?,
        Codec::Zstd => zstd::bulk::decompress_to_buffer(stored, out).context("zstd data of a batch")?,
    };
    ensure!(got == plain, "a batch of {got} bytes that claims {plain}");
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::ImageKind;
    use crate::memory::Space;
    use crate::memory::batch::{Builder, decode};
    use crate::memory::read::Chunk;

    const LZ4: Option<Sample> = Some(Sample { speed: 700e6, ratio: 0.4 });
    const ZSTD: Option<Sample> = Some(Sample { speed: 300e6, ratio: 0.3 });

    #[test]
    fn the_link_decides() {
        assert_eq!(choose(1.2e9, LZ4, ZSTD), Codec::None, "a fast link needs no help");
        assert_eq!(choose(117e6, LZ4, ZSTD), Codec::Zstd, "1 Gbit/s: 300 against 292");
        assert_eq!(choose(250e6, LZ4, ZSTD), Codec::Lz4, "2 Gbit/s: 625 against 300");
        assert_eq!(choose(12e6, LZ4, ZSTD), Codec::Zstd, "100 Mbit/s: the smaller");
        let noise = Some(Sample { speed: 2e9, ratio: 1.0 });
        assert_eq!(choose(12e6, noise, noise), Codec::None, "nothing to gain");
        assert_eq!(choose(12e6, None, None), Codec::None, "nothing known");
    }

    fn payload(bytes: &[u8]) -> Vec<u8> {
        let mut builder = Builder::new(Space { kind: ImageKind::Pid, id: 1 }, MAX_BATCH);
        let full = builder.push(Chunk::Data { vaddr: 0, bytes });
        full.or_else(|| builder.finish()).unwrap()
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut seed = 1u64;
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 56) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn what_does_not_shrink_goes_as_it_is_and_is_soon_left_alone() {
        let noise = payload(&noise(256 << 10));
        for compression in [Compression::Lz4, Compression::Zstd] {
            let mut c = Compressor::new(compression);
            let mut tried = 0;
            for _ in 0..100 {
                tried += u32::from(c.skip == 0);
                assert!(c.pack(noise.clone()) == noise);
            }
            assert!(tried < 12, "{tried}");
            let text = payload(&b"a text that repeats ".repeat(1 << 14)[..256 << 10]);
            let mut packed = (0..65).map(|_| c.pack(text.clone()).len());
            assert!(packed.any(|n| n < text.len() / 10), "compressible data is noticed again");
            assert!(c.pack(text.clone()).len() < text.len() / 10);
        }
    }

    #[test]
    fn auto_follows_the_link() {
        let text = payload(&b"a text that repeats ".repeat(1 << 14)[..256 << 10]);
        let mut c = Compressor::new(Compression::Auto);
        assert_eq!(c.pack(text.clone()).len(), text.len(), "no link rate yet");
        c.meter().sent(1_000_000, Duration::from_secs(1));
        let small = c.pack(text.clone());
        assert!(small.len() < text.len() / 10);
        let mut scratch = Vec::new();
        assert_eq!(decode(&small, &mut scratch).unwrap().bytes(), 256 << 10);
        for _ in 0..100 {
            c.meter().sent(1 << 30, Duration::from_micros(1));
        }
        (0..RESAMPLE / (256 << 10)).for_each(|_| drop(c.pack(text.clone())));
        assert_eq!(c.pack(text.clone()).len(), text.len());
        c.limit(1_000_000);
        (0..=RESAMPLE / (256 << 10)).for_each(|_| drop(c.pack(text.clone())));
        assert!(c.pack(text.clone()).len() < text.len() / 10, "the operator's limit is the link");
    }

    #[test]
    fn a_lie_about_the_length_is_noticed() {
        for compression in [Compression::Lz4, Compression::Zstd] {
            let good = Compressor::new(compression).pack(payload(&[1; 64 << 10]));
            let mut scratch = Vec::new();
            assert!(decode(&good, &mut scratch).is_ok());
            for plain in [60u32 << 10, 68 << 10] {
                let mut bad = good.clone();
                let run = bad.len() - 8;
                bad[16..20].copy_from_slice(&plain.to_le_bytes());
                bad[run..].copy_from_slice(&u64::from(plain).to_le_bytes());
                assert!(decode(&bad, &mut scratch).is_err(), "{compression} {plain}");
            }
        }
    }
}
