//! Reads along while packages are installed, to report progress; and reads dpkg's list of the result. Pure.

use crate::progress::printable;

/// Progress made out of what mmdebstrap, apt and dpkg print.
#[derive(Debug, Default)]
pub struct Listener {
    expected: usize,
    steps: usize,
    fraction: f32,
}

impl Listener {
    /// Takes a line; returns what to show, if the line is relevant, and how much is done, if that is known.
    pub fn hear(&mut self, line: &str) -> Option<(String, Option<f32>)> {
        if let Some(rest) = line.split_once(" upgraded, ").map(|(_, rest)| rest) {
            let count = rest.split(' ').next().and_then(|count| count.parse::<usize>().ok()).unwrap_or(0);
            self.expected = self.expected.saturating_add(count);
            return None;
        }
        let detail = if let Some(words) = line.strip_prefix("I: ") {
            // These two repeat a script's text, or what the next stage reports anyway.
            if words.starts_with("running --") || words.starts_with("success") {
                return None;
            }
            words.trim_end_matches('.').to_owned()
        } else if let Some(package) = line.strip_prefix("Get:") {
            format!("download {}", package.split(' ').nth(4).unwrap_or("the package lists"))
        } else if let Some(package) = line.strip_prefix("Unpacking ").or_else(|| line.strip_prefix("Setting up ")) {
            self.steps += 1;
            let verb = if line.starts_with('U') { "unpack" } else { "set up" };
            format!("{verb} {}", package.split([' ', ':']).next().unwrap_or(""))
        } else {
            return None;
        };
        if self.expected > 0 {
            // Each package is unpacked and set up. A second round of packages must not turn the bar back.
            #[expect(clippy::cast_precision_loss, reason = "a few hundred packages")]
            let done = self.steps as f32 / (2 * self.expected) as f32;
            self.fraction = self.fraction.max(done.min(1.0));
        }
        Some((printable(&detail), (self.expected > 0).then_some(self.fraction)))
    }
}

/// `name version architecture` of every installed package, sorted, out of dpkg's status file.
pub fn installed(status: &str) -> String {
    let mut lines: Vec<String> = status
        .split("\n\n")
        .filter_map(|stanza| {
            let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            (field("Status:")? == "install ok installed")
                .then(|| Some(format!("{} {} {}\n", field("Package:")?, field("Version:")?, field("Architecture:")?)))?
        })
        .collect();
    lines.sort();
    lines.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_never_goes_back() {
        let mut listener = Listener::default();
        let mut last = 0.0;
        let lines = [
            "0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.",
            "Get:1 http://mirror.example/debian bookworm/main amd64 bash amd64 5.2 [1 kB]",
            "Unpacking bash (5.2) ...",
            "Unpacking git (1:2.39) ...",
            "Setting up bash (5.2) ...",
            "0 upgraded, 50 newly installed, 0 to remove and 0 not upgraded.",
            "Setting up libc6:amd64 (2.36) ...",
        ];
        let mut shown = Vec::new();
        for (detail, fraction) in lines.iter().filter_map(|line| listener.hear(line)) {
            assert!(fraction.unwrap() >= last);
            last = fraction.unwrap();
            shown.push(detail);
        }
        assert_eq!(shown, ["download bash", "unpack bash", "unpack git", "set up bash", "set up libc6"]);
    }

    #[test]
    fn installed_packages_are_listed_in_order() {
        let status = "Package: b\nStatus: install ok installed\nArchitecture: all\nVersion: 2\nDescription: x\n y\n\n\
            Package: gone\nStatus: deinstall ok config-files\nArchitecture: all\nVersion: 1\n\n\
            Package: a\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1:1-2\n";
        assert_eq!(installed(status), "a 1:1-2 amd64\nb 2 all\n");
    }
}
