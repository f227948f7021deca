//! Configuration of clients, in a file system of the test.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;

struct Rig {
    directory: tempfile::TempDir,
    host: Host,
}

impl Rig {
    fn new(files: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().to_owned();
        let rig =
            Self { host: Host { user_home: Some(root.join("root")), root, environment: BTreeMap::new() }, directory };
        for (path, text) in files {
            rig.write(path, text);
        }
        rig
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn home(&self) -> PathBuf {
        self.path().join("nido")
    }

    fn set(mut self, name: &str, value: &str) -> Self {
        self.host.environment.insert(name.into(), value.into());
        self
    }

    fn expand(&self, name: &str) -> Result<PresetRules> {
        expand(&name.parse().unwrap(), &self.home(), &self.host)
    }

    fn rules(&self, name: &str) -> Vec<String> {
        self.expand(name).unwrap().rules.iter().map(ToString::to_string).collect()
    }

    fn refusal(&self, name: &str) -> String {
        let error = self.expand(name).unwrap_err();
        assert_eq!(error.code(), Code::SpecInvalid);
        assert!(error.hint_for(nido_api::FrontEnd::Cli).is_some(), "{error}");
        error.to_string()
    }
}

#[test]
fn a_host_without_configuration_has_the_defaults_of_its_clients() {
    let rig = Rig::new(&[]);
    assert_eq!(rig.rules("@pip"), ["pypi.org:443", "files.pythonhosted.org:443"]);
    assert_eq!(rig.rules("@npm"), ["registry.npmjs.org:443"]);
    assert_eq!(rig.rules("@cargo"), ["index.crates.io:443", "static.crates.io:443"]);
    assert!(rig.refusal("@apt").contains("no sources of apt"));
    assert!(rig.expand("@npm").unwrap().warnings[0].contains("channel out"));
}

#[test]
fn apt_sources_of_both_formats_are_read() {
    let rig = Rig::new(&[
        (
            "etc/apt/sources.list",
            "# deb http://commented.example/ x\ndeb [arch=amd64 signed-by=/k] http://mirror.example/debian bookworm main\n\
             deb-src https://mirror.example:8443/debian bookworm main # https://comment.example\ndeb cdrom:[Debian 12]/ x\n\
             deb file:///srv/repo ./\ndeb http://user:secret@127.0.0.1:3142/debian sid main\n",
        ),
        (
            "etc/apt/sources.list.d/a.sources",
            "Types: deb\nURIs: http://first.example/debian\n https://second.example/\nSuites: bookworm\n\nEnabled: no\n\
             URIs: http://disabled.example/\n\n# x\nURIs: http://192.168.1.5/ubuntu ssh://x.example/\n",
        ),
        ("etc/apt/sources.list.d/off.list.save", "deb http://saved.example/ x"),
        (
            "etc/apt/apt.conf.d/01proxy",
            "Acquire::http::Proxy \"http://proxy.example:3128/\";\n// Acquire::http::Proxy \"http://no.example\";\n\
             Acquire::https::Proxy \"DIRECT\";\n",
        ),
    ]);
    let found = rig.expand("@apt").unwrap();
    let rules: Vec<_> = found.rules.iter().map(ToString::to_string).collect();
    let expected = "mirror.example:80 mirror.example:8443 host:3142 first.example:80 second.example:443 192.168.1.5:80 \
        proxy.example:3128";
    assert_eq!(rules.join(" "), expected);
    // What is no server of HTTP is reported, without its URL.
    assert!(found.warnings.len() == 1 && found.warnings[0].contains("a.sources"), "{found:?}");
    assert!(!format!("{found:?}").contains("secret"));
}

#[test]
fn pip_follows_its_environment_then_the_file_of_the_user_then_that_of_the_system() {
    let system = (
        "etc/pip.conf",
        "[global]\nindex-url = https://system.example/simple\nextra_index_url = https://extra.example/a\n",
    );
    let rig = Rig::new(&[system]);
    assert_eq!(rig.rules("@pip"), ["extra.example:443", "system.example:443"]);
    rig.write(
        "root/.config/pip/pip.conf",
        "[global]\nindex-url: http://localhost:3141/root/pypi\nextra-index-url =\n    https://one.example/\n    https://pypi.org/simple\n\
         [list]\nindex-url = https://unused.example/\n[install]\nfind-links = /srv/wheels https://links.example/w\n",
    );
    let expected = ["one.example:443", "pypi.org:443", "links.example:443", "host:3141", "files.pythonhosted.org:443"];
    assert_eq!(rig.rules("@pip"), expected);
    let rig = rig
        .set("PIP_INDEX_URL", "https://u:secret@env.example:444/simple")
        .set("PIP_EXTRA_INDEX_URL", "http://127.0.0.1:99");
    assert_eq!(rig.rules("@pip"), ["host:99", "links.example:443", "env.example:444"]);
    let odd = Rig::new(&[]).set("PIP_INDEX_URL", "not a url");
    assert!(odd.refusal("@pip").contains("names no server"));
}

#[test]
fn npm_and_cargo_follow_their_files() {
    let rig = Rig::new(&[
        ("etc/npmrc", "registry=https://system.example/\n"),
        (
            "root/.npmrc",
            "@corp:registry=https://corp.example/npm/\n//corp.example/npm/:_authToken=secret\nregistry = \"http://${MIRROR}:4873/\"\n\
             @x:registry=https://${UNSET}/\n",
        ),
        (
            "root/.cargo/config.toml",
            "[source.crates-io]\nreplace-with = 'mirror'\n[source.mirror]\nregistry = 'sparse+https://cargo.example:8443/i/'\n\
             [registries.corp]\nindex = 'https://git.example/index'\n[build]\njobs = 1\n",
        ),
    ])
    .set("MIRROR", "127.0.0.1");
    let npm = rig.expand("@npm").unwrap();
    assert_eq!(npm.rules.iter().map(ToString::to_string).collect::<Vec<_>>(), ["corp.example:443", "host:4873"]);
    assert!(npm.warnings.iter().any(|warning| warning.contains("not set")), "{npm:?}");
    let cargo = rig.expand("@cargo").unwrap();
    assert_eq!(
        cargo.rules.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["cargo.example:8443", "git.example:443"]
    );
    assert!(cargo.warnings.iter().any(|warning| warning.contains("another server")), "{cargo:?}");
    rig.write(
        "root/.cargo/config.toml",
        "[source.crates-io]\nreplace-with = 'a'\n[source.a]\nreplace-with = 'crates-io'\n",
    );
    assert!(rig.refusal("@cargo").contains("circle"));
    rig.write("root/.cargo/config.toml", "[source\n");
    assert!(rig.refusal("@cargo").contains("line 1"));
}

#[test]
fn files_of_the_home_add_and_replace_presets() {
    let rig = Rig::new(&[(
        "nido/presets.d/corp.toml",
        "version = 3\n[presets.corp]\ndescription = 'x'\nrules = ['a.example:443']\n[presets.pip]\nrules = ['host:3141']\n",
    )]);
    assert_eq!((rig.rules("@corp"), rig.rules("@pip")), (vec!["a.example:443".into()], vec!["host:3141".into()]));
    let list = list(&rig.home(), &rig.host).unwrap();
    let pip = list.presets.iter().find(|preset| preset.name.as_str() == "pip").unwrap();
    assert_eq!(pip.source, "presets.d/corp.toml");
    assert!(rig.refusal("@pipp").contains("no preset '@pipp'"));
    rig.write("nido/presets.d/broken.toml", "[presets.x]\nrules = [\n'no rule!']\n");
    let refusal = rig.refusal("@pip");
    assert!(refusal.contains("presets.d/broken.toml: line"), "{refusal}");
    rig.write("nido/presets.d/broken.toml", "\n[presets.x]\nrules = []\n");
    assert!(rig.refusal("@corp").contains("broken.toml: line 2"), "{}", rig.refusal("@corp"));
}

#[test]
fn files_that_cannot_be_read_are_errors() {
    let rig = Rig::new(&[("etc/pip.conf", "x".repeat(300 << 10).as_str())]);
    assert!(rig.refusal("@pip").contains("longer than"));
    let rig = Rig::new(&[("etc/npmrc/x", "")]);
    assert!(rig.refusal("@npm").contains("not a file"));
}

#[test]
fn the_presets_of_nido_are_valid_and_unknown_names_have_neighbours() {
    let names: Vec<_> = built_in().unwrap().presets().map(|preset| preset.name.to_string()).collect();
    for name in "@ubuntu @debian @rustup @go @maven @rubygems @github @gitlab @docker @anthropic @openai".split(' ') {
        assert!(names.contains(&name.to_owned()), "{name}");
    }
    let error = Rig::new(&[]).expand("@gihub").unwrap_err();
    assert!(error.hint_for(nido_api::FrontEnd::Cli).unwrap().contains("@github"), "{error}");
}
