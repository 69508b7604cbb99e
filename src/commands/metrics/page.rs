//! Writes families, in whichever format is asked for.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use vmafx_bypass::Reason;

use super::family::Family;

/// What a collector fills.
pub struct Page<'e>(DescriptorEncoder<'e>);

/// A number in a base unit.
#[derive(Debug, Clone, Copy)]
pub enum Number {
    Whole(u64),
    Real(f64),
}

impl From<u64> for Number {
    fn from(n: u64) -> Self {
        Self::Whole(n)
    }
}

impl From<usize> for Number {
    fn from(n: usize) -> Self {
        Self::Whole(n as u64)
    }
}

impl From<bool> for Number {
    fn from(is_so: bool) -> Self {
        Self::Whole(is_so.into())
    }
}

impl From<f64> for Number {
    fn from(n: f64) -> Self {
        Self::Real(n)
    }
}

impl<'e> Page<'e> {
    pub fn new(encoder: DescriptorEncoder<'e>) -> Self {
        Self(encoder)
    }

    fn family(
        &mut self,
        family: &Family,
        write: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result,
    ) -> fmt::Result {
        let (name, unit) = family.parts();
        let encoder = &mut self.0;
        write(&mut encoder.encode_descriptor(name, family.help, unit.as_ref(), family.kind)?)
    }

    /// A family of one number.
    pub fn one(&mut self, family: &Family, number: impl Into<Number>) -> fmt::Result {
        self.each(family, [([], number)])
    }

    /// A family by its labels, whose values come in the table's order.
    pub fn each<'v, const N: usize, V: Into<Number>>(
        &mut self,
        family: &Family,
        numbers: impl IntoIterator<Item = ([&'v str; N], V)>,
    ) -> fmt::Result {
        self.family(family, |encoder| {
            for (values, number) in numbers {
                let labels = labels(family, values);
                let mut encoder = encoder.encode_family(&labels)?;
                let is_counter = family.kind == MetricType::Counter;
                match number.into() {
                    Number::Whole(n) if is_counter => {
                        encoder.encode_counter::<NoLabelSet, u64, f64>(&n, None)
                    }
                    Number::Real(n) if is_counter => {
                        encoder.encode_counter::<NoLabelSet, f64, f64>(&n, None)
                    }
                    Number::Whole(n) => encoder.encode_gauge(&n),
                    Number::Real(n) => encoder.encode_gauge(&n),
                }?;
            }
            Ok(())
        })
    }

    /// A family by reason, all of them.
    pub fn by_reason(&mut self, family: &Family, counts: &BTreeMap<Reason, u64>) -> fmt::Result {
        let count = |reason| counts.get(reason).copied().unwrap_or(0);
        let all = Reason::ALL.iter();
        self.each(family, all.map(|reason| ([reason.name()], count(reason))))
    }

    /// A family that is all label.
    pub fn info<const N: usize>(&mut self, family: &Family, values: [&str; N]) -> fmt::Result {
        self.family(family, |encoder| {
            encoder.encode_info(&labels(family, values))
        })
    }

    /// A family of durations by their labels.
    #[cfg(feature = "ebpf")]
    pub fn durations<'v, const N: usize>(
        &mut self,
        family: &Family,
        all: impl IntoIterator<Item = ([&'v str; N], vmafx_bypass::handover::Durations)>,
    ) -> fmt::Result {
        self.family(family, |encoder| {
            for (values, durations) in all {
                let labels = labels(family, values);
                let (count, buckets) = (durations.count(), &durations.buckets);
                encoder
                    .encode_family(&labels)?
                    .encode_histogram::<NoLabelSet>(durations.sum, count, buckets, None)?;
            }
            Ok(())
        })
    }
}

fn labels<'v, const N: usize>(
    family: &Family,
    values: [&'v str; N],
) -> [(&'static str, &'v str); N] {
    debug_assert_eq!(family.labels.len(), N, "{}", family.name);
    std::array::from_fn(|n| (family.labels[n], values[n]))
}
