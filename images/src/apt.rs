//! Which Debian mirror a build uses: the host's own, if its apt sources have the release. Pure parsers for both formats of
//! apt's sources and for the network options of `apt-config dump`. Nothing of the host's apt state is touched.

/// One `deb` line in the one-line format, as mmdebstrap takes it.
pub type SourceLine = String;

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Entry {
    uri: String,
    suite: String,
    components: Vec<String>,
    signed_by: Option<String>,
}

/// The host's sources for `suite`: the lines to use if both the release and its security updates are among them,
/// else none, which means Debian's defaults as mmdebstrap knows them. `files` are (file name, content).
#[must_use]
pub fn lines_for(suite: &str, files: &[(String, String)]) -> Vec<SourceLine> {
    let entries: Vec<Entry> = files
        .iter()
        .flat_map(|(name, text)| match name.rsplit('.').next() {
            Some("sources") => stanzas(text),
            Some("list") => text.lines().filter_map(one_line).collect(),
            _ => Vec::new(),
        })
        .filter(|entry| entry.components.iter().any(|component| component == "main"))
        .collect();
    let with_suite = |suite: &str| entries.iter().filter(move |entry| entry.suite == suite).collect::<Vec<_>>();
    let (release, security) = (with_suite(suite), with_suite(&format!("{suite}-security")));
    if release.is_empty() || security.is_empty() {
        return Vec::new();
    }
    let mut lines: Vec<SourceLine> = Vec::new();
    for entry in release.into_iter().chain(with_suite(&format!("{suite}-updates"))).chain(security) {
        let line = entry.to_line();
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines
}

/// The host's options for reaching its mirror, out of `apt-config dump`: proxies, certificates, retries, and whether a
/// mirror that is a snapshot of the past is accepted.
#[must_use]
pub fn network_options(dump: &str) -> Vec<String> {
    const MIRROR_OPTIONS: [&str; 5] = [
        "Acquire::http::",
        "Acquire::https::",
        "Acquire::Retries ",
        "Acquire::Check-Valid-Until ",
        "Acquire::Check-Date ",
    ];
    dump.lines()
        .map(str::trim)
        .filter(|line| MIRROR_OPTIONS.iter().any(|prefix| line.starts_with(prefix)) && !line.ends_with(" \"\";"))
        .map(|line| line.trim_end_matches(';').to_owned())
        .collect()
}

/// Those of [`network_options`] that belong to the mirror rather than to the host's network: the guest needs them too.
#[must_use]
pub fn mirror_options(network: &[String]) -> Vec<String> {
    network.iter().filter(|option| option.starts_with("Acquire::Check-")).cloned().collect()
}

impl Entry {
    fn to_line(&self) -> SourceLine {
        let options = self.signed_by.as_ref().map(|key| format!("[signed-by={key}] ")).unwrap_or_default();
        format!("deb {options}{} {} {}", self.uri, self.suite, self.components.join(" "))
    }
}

/// `deb [options] uri suite component…`
fn one_line(line: &str) -> Option<Entry> {
    let line = line.split('#').next().unwrap_or("").trim().strip_prefix("deb")?;
    let rest = line.strip_prefix(char::is_whitespace)?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace().map(str::to_owned);
    let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
    Some(Entry {
        uri: words.next().filter(|uri| is_uri(uri))?,
        suite: words.next()?,
        components: words.collect(),
        signed_by: signed_by.and_then(key_file),
    })
}

/// The deb822 format: stanzas of fields, continued by lines that start with a blank.
fn stanzas(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut stanza: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            entries.extend(stanza_entries(&stanza));
            stanza.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = stanza.last_mut() {
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((field, value)) = line.split_once(':') {
            stanza.push((field.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    entries
}

fn stanza_entries(stanza: &[(String, String)]) -> Vec<Entry> {
    let field = |name: &str| stanza.iter().find(|(field, _)| field == name).map_or("", |(_, value)| value);
    let has = |name: &str, word: &str| field(name).split_whitespace().any(|found| found == word);
    if !has("types", "deb") || has("enabled", "no") {
        return Vec::new();
    }
    let components: Vec<String> = field("components").split_whitespace().map(str::to_owned).collect();
    let mut entries = Vec::new();
    for uri in field("uris").split_whitespace().filter(|uri| is_uri(uri)) {
        for suite in field("suites").split_whitespace() {
            entries.push(Entry {
                uri: uri.to_owned(),
                suite: suite.to_owned(),
                components: components.clone(),
                signed_by: key_file(field("signed-by")),
            });
        }
    }
    entries
}

/// A key given as one absolute file name; keys written out in the source are left to apt's trusted ones.
fn key_file(value: &str) -> Option<String> {
    (value.starts_with('/') && !value.contains(char::is_whitespace)).then(|| value.to_owned())
}

fn is_uri(word: &str) -> bool {
    word.starts_with("http://") || word.starts_with("https://") || word.starts_with("file:")
}

/// Debian's rule for package names; user and suite names of recipes keep to it too.
pub fn is_package_name(word: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    word.len() >= 2
        && word.bytes().next().is_some_and(plain)
        && word.bytes().all(|byte| plain(byte) || matches!(byte, b'+' | b'-' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEB822: &str = "Types: deb\n# a comment\nURIs: http://mirror.example/debian\nSuites: bookworm\n bookworm-updates\n\
        Components: main contrib\nSigned-By: /usr/share/keyrings/a.gpg\n\nTypes: deb deb-src\n\
        URIs: http://mirror.example/security\nSuites: bookworm-security\nComponents: main\n\n\
        Types: deb\nEnabled: no\nURIs: http://old.example/debian\nSuites: bookworm\nComponents: main\n";

    fn files(name: &str, text: &str) -> Vec<(String, String)> {
        vec![(name.to_owned(), text.to_owned())]
    }

    #[test]
    fn the_stanza_format_is_understood() {
        let lines = lines_for("bookworm", &files("debian.sources", DEB822));
        assert_eq!(
            lines,
            [
                "deb [signed-by=/usr/share/keyrings/a.gpg] http://mirror.example/debian bookworm main contrib",
                "deb [signed-by=/usr/share/keyrings/a.gpg] http://mirror.example/debian bookworm-updates main contrib",
                "deb http://mirror.example/security bookworm-security main",
            ]
        );
    }

    #[test]
    fn the_line_format_is_understood() {
        let text = "# deb http://no.example/ bookworm main\ndeb-src http://no.example/ bookworm main\n\
            deb [arch=amd64 signed-by=/k.gpg] http://a.example/debian bookworm main # own mirror\n\
            deb\thttp://a.example/sec bookworm-security main\n";
        let lines = lines_for("bookworm", &files("sources.list", text));
        assert_eq!(lines[0], "deb [signed-by=/k.gpg] http://a.example/debian bookworm main");
        assert_eq!(lines[1], "deb http://a.example/sec bookworm-security main");
        assert_eq!(lines.len(), 2);
    }

    #[test]
    fn another_release_or_missing_updates_mean_the_defaults() {
        assert!(lines_for("trixie", &files("debian.sources", DEB822)).is_empty());
        let only_release = "deb http://a.example/debian bookworm main\n";
        assert!(lines_for("bookworm", &files("sources.list", only_release)).is_empty());
        assert!(lines_for("bookworm", &files("debian.sources.save", DEB822)).is_empty());
    }

    #[test]
    fn only_network_options_are_taken_over() {
        let dump = "APT::Architecture \"amd64\";\nAcquire::http::Proxy \"http://proxy.example:3128\";\n\
            Acquire::https::Verify-Peer \"\";\nAcquire::Check-Date \"false\";\nDPkg::Post-Invoke:: \"rm\";\n";
        let network = network_options(dump);
        assert_eq!(network, ["Acquire::http::Proxy \"http://proxy.example:3128\"", "Acquire::Check-Date \"false\""]);
        assert_eq!(mirror_options(&network), ["Acquire::Check-Date \"false\""]);
    }

    proptest! {
        #[test]
        fn no_source_file_makes_the_parsers_panic(text: String) {
            let _ = lines_for("bookworm", &files("a.list", &text));
            let _ = lines_for("bookworm", &files("a.sources", &text));
            let _ = network_options(&text);
        }
    }
}
