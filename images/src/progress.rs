//! How a build reports its progress to its caller. Plain values; rendering is the caller's.

/// The stages of a build, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Read the recipe, look for the tools, decide what can be reused.
    Resolve,
    /// Download and install the packages; unpack the kernel package.
    Packages,
    /// Extract the kernel and the modules the agent loads.
    Kernel,
    /// Make the root disk.
    Disk,
    /// Put the agent and the modules into the initramfs.
    Initramfs,
    /// Move the parts into the store and publish the manifest.
    Publish,
}

impl Stage {
    /// All stages in order.
    pub const ALL: [Self; 6] =
        [Self::Resolve, Self::Packages, Self::Kernel, Self::Disk, Self::Initramfs, Self::Publish];

    /// A short lower-case name for text and JSON output.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Resolve => "resolve",
            Self::Packages => "packages",
            Self::Kernel => "kernel",
            Self::Disk => "disk",
            Self::Initramfs => "initramfs",
            Self::Publish => "publish",
        }
    }
}

impl std::fmt::Display for Stage {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.word())
    }
}

/// One report of a running build.
#[derive(Debug, Clone, PartialEq)]
pub struct BuildProgress {
    /// The stage at work.
    pub stage: Stage,
    /// Its number, from 1.
    pub index: usize,
    /// How many stages there are.
    pub total: usize,
    /// What is being done, one printable line without control characters.
    pub detail: String,
    /// How much of the stage is done, 0 to 1, where that is known.
    pub fraction: Option<f32>,
}

impl BuildProgress {
    pub(crate) fn new(stage: Stage, detail: impl Into<String>, fraction: Option<f32>) -> Self {
        let index = Stage::ALL.iter().position(|known| *known == stage).unwrap_or(0) + 1;
        Self { stage, index, total: Stage::ALL.len(), detail: detail.into(), fraction }
    }
}

/// One printable line out of whatever a program wrote: control characters are escaped, the rest is cut at 200 characters.
#[must_use]
pub(crate) fn printable(text: &str) -> String {
    text.chars().take(200).fold(String::new(), |mut line, character| {
        if character.is_control() || is_invisible(character) {
            line.extend(character.escape_unicode());
        } else {
            line.push(character);
        }
        line
    })
}

/// Bidirectional and zero-width characters, which make a terminal show something else than what is there.
const fn is_invisible(character: char) -> bool {
    matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn a_printable_line_holds_no_control_characters(text: String) {
            proptest::prop_assert!(!printable(&text).chars().any(char::is_control));
        }
    }

    #[test]
    fn stages_are_counted_from_one() {
        let first = BuildProgress::new(Stage::Resolve, "", None);
        let last = BuildProgress::new(Stage::Publish, "", None);
        assert_eq!((first.index, last.index, last.total), (1, 6, 6));
    }
}
