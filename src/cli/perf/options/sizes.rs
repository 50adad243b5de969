//! How large bodies are: all the same, several sizes in turn, or anything in a range.

use std::fmt;

const MAX_SIZE_BYTES: usize = 512 << 20;
const MAX_SIZES: usize = 1_000;

/// The sizes of a run's bodies, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sizes {
    Each(usize),
    /// In turn; at least two.
    InTurn(Vec<usize>),
    /// At random, both ends included; the first is the smaller.
    Between(usize, usize),
}

impl Sizes {
    /// Reads `16`, `16,1024,65536` or `100-5000`.
    ///
    /// # Errors
    /// What is wrong with it, for clap to show beside the option's name.
    pub(in super::super) fn parse(text: &str) -> Result<Self, String> {
        let size = |text: &str| match text.trim().parse::<usize>() {
            Ok(size) if size <= MAX_SIZE_BYTES => Ok(size),
            Ok(_) => Err(format!("sizes go up to {MAX_SIZE_BYTES} bytes")),
            Err(_) => Err("it needs a size (16), several (16,1024) or a range (100-5000), in bytes".to_owned()),
        };
        if let Some((least, most)) = text.split_once('-') {
            let (least, most) = (size(least)?, size(most)?);
            return match least.cmp(&most) {
                std::cmp::Ordering::Less => Ok(Self::Between(least, most)),
                std::cmp::Ordering::Equal => Ok(Self::Each(least)),
                std::cmp::Ordering::Greater => Err("the range ends before it begins".to_owned()),
            };
        }
        let sizes = text.split(',').map(size).collect::<Result<Vec<_>, _>>()?;
        match sizes[..] {
            [each] => Ok(Self::Each(each)),
            _ if sizes.len() > MAX_SIZES => Err(format!("it takes up to {MAX_SIZES} sizes")),
            _ => Ok(Self::InTurn(sizes)),
        }
    }

    /// The mean over many messages.
    pub(in super::super) fn mean_bytes(&self) -> f64 {
        match self {
            Self::Each(size) => *size as f64,
            Self::InTurn(sizes) => sizes.iter().map(|size| *size as f64).sum::<f64>() / sizes.len() as f64,
            Self::Between(least, most) => (*least as f64 + *most as f64) / 2.0,
        }
    }

    /// Whether a body of `bytes` is one of this run's.
    #[inline]
    pub(in super::super) fn admit(&self, bytes: u64) -> bool {
        match self {
            Self::Each(size) => bytes == *size as u64,
            Self::InTurn(sizes) => sizes.iter().any(|size| bytes == *size as u64),
            Self::Between(least, most) => (*least as u64..=*most as u64).contains(&bytes),
        }
    }
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Each(size) => write!(f, "{size}"),
            Self::InTurn(sizes) => {
                let sizes: Vec<_> = sizes.iter().map(usize::to_string).collect();
                f.write_str(&sizes.join(","))
            }
            Self::Between(least, most) => write!(f, "{least}-{most}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_one_several_or_a_range() {
        assert_eq!(Sizes::parse("16"), Ok(Sizes::Each(16)));
        assert_eq!(Sizes::parse("16,1024"), Ok(Sizes::InTurn(vec![16, 1024])));
        assert_eq!(Sizes::parse("100-5000"), Ok(Sizes::Between(100, 5000)));
        assert_eq!(Sizes::parse("7-7"), Ok(Sizes::Each(7)));
        for text in ["0", "16,1024,65536", "100-5000"] {
            assert_eq!(Sizes::parse(text).expect(text).to_string(), text);
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "x", "16,", "9-1", "1-", "-1", "999999999999", "1,999999999999"] {
            assert!(Sizes::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_mix_knows_its_mean_and_its_own() {
        let sizes = |text| Sizes::parse(text).expect(text);
        assert_eq!(["10", "10,20", "10-30"].map(|text| sizes(text).mean_bytes()), [10.0, 15.0, 20.0]);
        let admitted = |text, candidates: [u64; 4]| candidates.map(|bytes| sizes(text).admit(bytes));
        assert_eq!(admitted("10", [9, 10, 11, 0]), [false, true, false, false]);
        assert_eq!(admitted("10,20", [10, 15, 20, 21]), [true, false, true, false]);
        assert_eq!(admitted("10-30", [9, 10, 30, 31]), [false, true, true, false]);
    }
}
