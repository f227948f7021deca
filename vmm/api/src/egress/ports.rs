//! The ports of a rule.
//!
//! Invariant: ranges are in order, do not overlap or touch, and do not hold port 0; all ports together are [`Ports::All`].

use std::fmt;

/// Ports from the first to the last, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// The range from `first` to `last`; `None` if it is empty or holds port 0.
    #[must_use]
    pub const fn new(first: u16, last: u16) -> Option<Self> {
        if first == 0 || first > last { None } else { Some(Self { first, last }) }
    }

    /// Its lowest port.
    #[must_use]
    pub const fn first(self) -> u16 {
        self.first
    }

    /// Its highest port.
    #[must_use]
    pub const fn last(self) -> u16 {
        self.last
    }

    /// Whether it holds a port.
    #[must_use]
    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

/// The ports of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Ports {
    /// `*`
    All,
    /// Ranges, made by [`Ports::of`].
    Ranges(Vec<PortRange>),
}

impl Default for Ports {
    /// Those of the web: 80 and 443.
    fn default() -> Self {
        Self::Ranges([80, 443].map(|port| PortRange { first: port, last: port }).into())
    }
}

impl Ports {
    /// The ports of all these ranges.
    #[must_use]
    pub fn of(mut ranges: Vec<PortRange>) -> Self {
        ranges.sort_unstable();
        let mut merged: Vec<PortRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(before) if range.first <= before.last.saturating_add(1) => {
                    before.last = before.last.max(range.last);
                }
                _ => merged.push(range),
            }
        }
        match merged[..] {
            [PortRange { first: 1, last: u16::MAX }] => Self::All,
            _ => Self::Ranges(merged),
        }
    }

    /// The ports that a rule names.
    pub(super) fn parse(text: &str) -> Option<Self> {
        if text == "*" {
            return Some(Self::All);
        }
        let port = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten();
        let range = |text: &str| {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            PortRange::new(port(first)?, port(last)?)
        };
        text.split(',').map(range).collect::<Option<Vec<_>>>().map(Self::of)
    }

    /// Whether a port is among them. Port 0 never is.
    #[must_use]
    pub fn contains(&self, port: u16) -> bool {
        match self {
            Self::All => port != 0,
            Self::Ranges(ranges) => ranges.iter().any(|range| range.contains(port)),
        }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Ranges(ranges) = self else { return f.write_str("*") };
        for (number, range) in ranges.iter().enumerate() {
            f.write_str(if number == 0 { "" } else { "," })?;
            if range.first == range.last {
                write!(f, "{}", range.first)?;
            } else {
                write!(f, "{}-{}", range.first, range.last)?;
            }
        }
        Ok(())
    }
}
