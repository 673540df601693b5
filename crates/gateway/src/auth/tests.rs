//! Callers are recognized by files as they would be in the field.

use std::path::{Path, PathBuf};

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::policy::JwksSource;

/// A folder that ends with its test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = format!("andon-auth-{}-{name}", std::process::id());
        let folder = std::env::temp_dir().join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Signing {
    kid: &'static str,
    algorithm: Algorithm,
    key: EncodingKey,
}

impl Signing {
    fn rsa(kid: &'static str) -> Self {
        let pair = aws_lc_rs::rsa::KeyPair::generate(KeySize::Rsa2048).unwrap();
        let der = AsDer::<aws_lc_rs::encoding::Pkcs8V1Der>::as_der(&pair).unwrap();
        // PKCS #8 holds the key of PKCS #1 behind a head of 26 bytes.
        let key = EncodingKey::from_rsa_der(&der.as_ref()[26..]);
        Self {
            kid,
            algorithm: Algorithm::RS256,
            key,
        }
    }

    fn p256(kid: &'static str) -> Self {
        let random = aws_lc_rs::rand::SystemRandom::new();
        let der = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let key = EncodingKey::from_ec_der(der.as_ref());
        Self {
            kid,
            algorithm: Algorithm::ES256,
            key,
        }
    }

    fn ed25519(kid: &'static str) -> Self {
        let random = aws_lc_rs::rand::SystemRandom::new();
        let der = Ed25519KeyPair::generate_pkcs8v1(&random).unwrap();
        let key = EncodingKey::from_ed_der(der.as_ref());
        Self {
            kid,
            algorithm: Algorithm::EdDSA,
            key,
        }
    }

    fn jwk(&self) -> Value {
        let mut jwk = Jwk::from_encoding_key(&self.key, self.algorithm).unwrap();
        jwk.common.key_id = Some(self.kid.to_owned());
        serde_json::to_value(jwk).unwrap()
    }

    fn sign(&self, claims: &Value) -> String {
        let mut head = Header::new(self.algorithm);
        head.kid = Some(self.kid.to_owned());
        encode(&head, claims, &self.key).unwrap()
    }
}

fn set(keys: &[&Signing]) -> String {
    json!({ "keys": keys.iter().map(|key| key.jwk()).collect::<Vec<_>>() }).to_string()
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

fn claims() -> Value {
    json!({
        "iss": "https://login.example", "aud": "andon", "exp": now() + 600,
        "sub": "someone", "tenant": "a",
    })
}

fn with(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

const POLICY: &str = r#"
    [tenants.a]
    models = ["minilm"]
    certificates = ["spiffe://a", "also-a"]
    [tenants.b]
    certificates = ["spiffe://b"]
    [tenants.guest]
    [jwt]
    jwks_file = "jwks.json"
    issuer = "https://login.example"
    audience = "andon"
"#;

fn auth(policy: &Path, keys: Option<&Path>) -> Auth {
    Auth::new(&AuthSettings {
        policy: Some(policy.to_owned()),
        keys: keys.map(Path::to_owned),
        ..AuthSettings::default()
    })
    .unwrap()
}

fn headers(all: &[(&'static str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in all {
        headers.append(*name, value.parse().unwrap());
    }
    headers
}

fn bearer_of(token: &str) -> HeaderMap {
    headers(&[("authorization", &format!("Bearer {token}"))])
}

fn shown(names: &[&str]) -> Peer {
    Peer {
        address: None,
        certificate_names: names.iter().map(ToString::to_string).collect(),
        ..Peer::default()
    }
}

async fn reason(auth: &Auth, headers: &HeaderMap) -> &'static str {
    let state = auth.state.load_full();
    match state.authenticate(headers, &Peer::default()).await {
        Ok(_) => "recognized",
        Err(rejection) => rejection.reason,
    }
}

#[tokio::test]
async fn tokens_of_three_kinds_are_recognized_and_remembered() {
    let folder = Folder::new("kinds");
    let all = [Signing::rsa("r"), Signing::p256("e"), Signing::ed25519("d")];
    folder.write("jwks.json", &set(&[&all[0], &all[1], &all[2]]));
    let auth = auth(&folder.write("policy.toml", POLICY), None);
    for signing in &all {
        let head = bearer_of(&signing.sign(&claims()));
        for _ in 0..2 {
            let caller = auth.caller(&head, &Peer::default()).await.unwrap();
            assert_eq!(caller.tenant.name, "a");
            assert_eq!(&*caller.credential, "jwt:someone");
        }
    }
    let only = Signing::p256("e");
    let mut head = Header::new(Algorithm::ES256);
    head.kid = None;
    let unnamed = bearer_of(&encode(&head, &claims(), &only.key).unwrap());
    assert_eq!(reason(&auth, &unnamed).await, "token_key");
    folder.write("jwks.json", &set(&[&only]));
    let state = auth.state.load_full();
    state.tokens.as_ref().unwrap().poll_file();
    assert_eq!(reason(&auth, &unnamed).await, "recognized");
    // Its signer is gone, and with it what was remembered.
    assert_eq!(
        reason(&auth, &bearer_of(&all[0].sign(&claims()))).await,
        "token_key"
    );
}

#[tokio::test]
async fn tokens_that_are_wrong_are_refused_for_what_is_wrong() {
    let folder = Folder::new("wrong");
    let signing = Signing::p256("e");
    folder.write("jwks.json", &set(&[&signing]));
    let auth = auth(&folder.write("policy.toml", POLICY), None);
    for (name, value, expected) in [
        ("exp", json!(now() - 60), "token_expired"),
        ("exp", json!(now() - 10), "recognized"),
        ("exp", Value::Null, "token_claims"),
        ("exp", json!("soon"), "token_claims"),
        ("exp", json!(1e300), "token_claims"),
        ("nbf", json!(now() + 60), "token_early"),
        ("nbf", json!(now() + 10), "recognized"),
        ("nbf", json!("soon"), "token_claims"),
        ("iss", json!("https://login.other"), "token_issuer"),
        ("iss", json!(["https://login.example"]), "token_issuer"),
        ("iss", Value::Null, "token_claims"),
        ("aud", json!("others"), "token_audience"),
        ("aud", json!(["others", "andon"]), "recognized"),
        ("aud", json!([]), "token_audience"),
        ("aud", Value::Null, "token_claims"),
        ("tenant", json!("nobody"), "tenant_unknown"),
        ("tenant", json!(["a"]), "tenant_unknown"),
        ("tenant", Value::Null, "tenant_unknown"),
        ("sub", json!(7), "recognized"),
    ] {
        let token = signing.sign(&with(name, value.clone()));
        assert_eq!(
            reason(&auth, &bearer_of(&token)).await,
            expected,
            "{name} {value}"
        );
    }
    let token = signing.sign(&claims());
    let (rest, signature) = token.rsplit_once('.').unwrap();
    let other = Signing::p256("e").sign(&claims());
    let stolen = format!("{rest}.{}", other.rsplit_once('.').unwrap().1);
    assert_eq!(reason(&auth, &bearer_of(&stolen)).await, "token_signature");
    assert_eq!(reason(&auth, &bearer_of(&other)).await, "token_signature");
    for wrong in [
        rest,
        &format!("{rest}."),
        "a.b.c",
        "token",
        &format!("{token}.{signature}"),
    ] {
        let found = reason(&auth, &bearer_of(wrong)).await;
        assert!(
            found == "token_malformed" || found == "token_signature",
            "{wrong} {found}"
        );
    }
    let long = format!("{rest}{}.{signature}", "A".repeat(9000));
    assert_eq!(reason(&auth, &bearer_of(&long)).await, "token_malformed");
}

#[tokio::test]
async fn the_key_decides_the_algorithm() {
    let folder = Folder::new("confusion");
    let (rsa, ec) = (Signing::rsa("r"), Signing::p256("e"));
    let jwk = rsa.jwk();
    folder.write("jwks.json", &set(&[&rsa, &ec]));
    let auth = auth(&folder.write("policy.toml", POLICY), None);
    let body = URL_SAFE_NO_PAD.encode(claims().to_string());
    for algorithm in ["none", "None", "NONE", "", "HS256"] {
        let head = json!({"alg": algorithm, "typ": "JWT", "kid": "r"});
        let head = URL_SAFE_NO_PAD.encode(head.to_string());
        let found = reason(&auth, &bearer_of(&format!("{head}.{body}."))).await;
        assert!(
            found == "token_malformed" || found == "token_algorithm",
            "{found}"
        );
    }
    let modulus = jwk["n"].as_str().unwrap();
    let bytes = URL_SAFE_NO_PAD.decode(modulus).unwrap();
    for secret in [modulus.as_bytes(), &bytes, jwk.to_string().as_bytes()] {
        let mut head = Header::new(Algorithm::HS256);
        head.kid = Some("r".to_owned());
        let token = encode(&head, &claims(), &EncodingKey::from_secret(secret)).unwrap();
        assert_eq!(reason(&auth, &bearer_of(&token)).await, "token_algorithm");
    }
    // A good signature of the right key, in a way that the key is not for.
    for algorithm in [Algorithm::RS512, Algorithm::PS256] {
        let mut head = Header::new(algorithm);
        head.kid = Some("r".to_owned());
        let token = encode(&head, &claims(), &rsa.key).unwrap();
        assert_eq!(reason(&auth, &bearer_of(&token)).await, "token_algorithm");
    }
    // One signer's token in another's name.
    let mut head = Header::new(Algorithm::ES256);
    head.kid = Some("r".to_owned());
    let token = encode(&head, &claims(), &ec.key).unwrap();
    assert_eq!(reason(&auth, &bearer_of(&token)).await, "token_algorithm");
    head.kid = Some("e".to_owned());
    head.crit = Some(vec!["b64".to_owned()]);
    let token = encode(&head, &claims(), &ec.key).unwrap();
    assert_eq!(reason(&auth, &bearer_of(&token)).await, "token_malformed");
}

#[test]
fn only_keys_for_signatures_are_taken() {
    let key = Signing::p256("e");
    let parsed = |change: fn(&mut Value)| {
        let mut jwk = key.jwk();
        change(&mut jwk);
        jwks::KeySet::parse(json!({ "keys": [jwk] }).to_string()).is_ok()
    };
    assert!(parsed(|_| {}));
    assert!(parsed(|jwk| jwk["use"] = json!("sig")));
    assert!(parsed(|jwk| jwk["key_ops"] = json!(["verify"])));
    assert!(!parsed(|jwk| jwk["use"] = json!("enc")));
    assert!(!parsed(|jwk| jwk["key_ops"] = json!(["sign"])));
    assert!(!parsed(|jwk| jwk["alg"] = json!("ES384")));
    assert!(!parsed(|jwk| jwk["alg"] = json!("HS256")));
    assert!(!parsed(|jwk| jwk["crv"] = json!("P-384")));
    assert!(!parsed(
        |jwk| *jwk = json!({"kty": "oct", "k": "AAAA", "kid": "e"})
    ));
    let two = json!({"keys": [key.jwk(), Signing::p256("e").jwk()]});
    assert!(jwks::KeySet::parse(two.to_string()).is_err());
    let same = json!({"keys": [key.jwk(), key.jwk(), {"kty": "new"}, 7]});
    assert!(jwks::KeySet::parse(same.to_string()).is_ok());
}

#[tokio::test]
async fn a_bad_or_doubled_key_keeps_the_others_of_its_set() {
    let (own, doubled) = (Signing::ed25519("own"), Signing::p256("doubled"));
    let mut bad = Signing::p256("bad").jwk();
    bad["x"] = json!("no base64 !");
    let other = Signing::p256("doubled").jwk();
    for further in [
        vec![bad.clone()],
        vec![json!({"kty": "RSA", "kid": "bare"}), json!(null)],
        vec![doubled.jwk(), other.clone()],
        vec![doubled.jwk(), other, doubled.jwk(), bad],
    ] {
        let keys: Vec<Value> = further.into_iter().chain([own.jwk()]).collect();
        let text = json!({ "keys": keys }).to_string();
        let folder = Folder::new("set");
        let path = folder.write("jwks.json", &text);
        let signers = jwks::Signers::new(&JwksSource::File(path)).unwrap();
        assert!(signers.choose(Some("own")).await.is_ok(), "{text}");
        for refused in ["doubled", "bad", "bare"] {
            assert!(signers.choose(Some(refused)).await.is_err(), "{refused}");
        }
    }
}

#[tokio::test]
async fn one_credential_is_read_wherever_it_stands() {
    let folder = Folder::new("where");
    let text = POLICY.split("[jwt]").next().unwrap();
    let policy = folder.write("policy.toml", &format!("anonymous = \"guest\"\n{text}"));
    let path = folder.0.join("keys.toml");
    let new = |tenant: &str| {
        let tenant = tenant.to_owned();
        KeyFile::at(&path)
            .create(NewKey {
                tenant,
                name: None,
                life: None,
            })
            .unwrap()
    };
    let (a, b) = (new("a"), new("b"));
    let auth = auth(&policy, Some(&path));
    let tenant = async |all: &[(&'static str, &str)], names: &[&str]| {
        let found = auth.caller(&headers(all), &shown(names)).await;
        found
            .map(|caller| caller.tenant.name.clone())
            .map_err(|error| error.kind())
    };
    let refused = Err(Kind::Unauthenticated);
    let bearer = format!("Bearer {a}");
    let small = format!("bearer   {a} ");
    for (all, names, expected) in [
        (vec![("authorization", bearer.as_str())], vec![], Ok("a")),
        (vec![("authorization", small.as_str())], vec![], Ok("a")),
        (vec![("x-api-key", a.as_str())], vec![], Ok("a")),
        (vec![("api-key", b.as_str())], vec![], Ok("b")),
        (
            vec![("authorization", bearer.as_str()), ("x-api-key", &a)],
            vec![],
            Ok("a"),
        ),
        (
            vec![("authorization", bearer.as_str()), ("x-api-key", &b)],
            vec![],
            refused,
        ),
        (vec![("x-api-key", &a), ("x-api-key", &b)], vec![], refused),
        (vec![], vec![], Ok("guest")),
        (vec![("x-api-key", "")], vec![], refused),
        (vec![("x-api-key", "else")], vec![], refused),
        (vec![("authorization", "Basic YTpi")], vec![], refused),
        (vec![("authorization", "Bearer")], vec![], refused),
        (vec![("authorization", "Bearer sk-else")], vec![], refused),
        (
            vec![("authorization", "Bearer sk-else")],
            vec!["spiffe://a"],
            refused,
        ),
        (vec![], vec!["spiffe://a"], Ok("a")),
        (vec![], vec!["unknown", "also-a"], Ok("a")),
        (vec![], vec!["spiffe://a", "also-a"], Ok("a")),
        (vec![], vec!["spiffe://a", "spiffe://b"], refused),
        (vec![], vec!["unknown"], refused),
        (vec![("x-api-key", &a)], vec!["unknown"], Ok("a")),
        (vec![("x-api-key", &a)], vec!["spiffe://a"], Ok("a")),
        (vec![("x-api-key", &a)], vec!["spiffe://b"], refused),
    ] {
        let expected = expected.map(str::to_owned);
        assert_eq!(tenant(&all, &names).await, expected, "{all:?} {names:?}");
    }
}

#[tokio::test]
async fn a_bad_file_keeps_no_key_from_being_revoked() {
    let folder = Folder::new("reload");
    let text = POLICY.split("[jwt]").next().unwrap();
    let policy = folder.write("policy.toml", text);
    let path = folder.0.join("keys.toml");
    let file = KeyFile::at(&path);
    let tenant = "a".to_owned();
    let key = file
        .create(NewKey {
            tenant,
            name: None,
            life: None,
        })
        .unwrap();
    let auth = auth(&policy, Some(&path));
    let mut files = auth.files.clone().unwrap();
    let mut reload = || {
        let after = auth.renewed(&mut files).map(Arc::new);
        after.is_some_and(|after| {
            auth.replace(after);
            true
        })
    };
    assert!(!reload());
    folder.write("policy.toml", "[tenants.a]\nno_such = 1");
    assert!(!reload());
    assert!(auth.policy().load().tenants["a"].may_call("minilm"));
    // It reads well, but its signers are not there.
    folder.write("policy.toml", POLICY);
    file.revoke(&key[6..14]).unwrap();
    assert!(reload());
    let head = headers(&[("x-api-key", &key)]);
    assert_eq!(reason(&auth, &head).await, "key_revoked");
    assert!(auth.policy().load().jwt.is_none());
    // It is tried again until they are.
    assert!(!reload());
    folder.write("jwks.json", &set(&[&Signing::ed25519("late")]));
    assert!(reload());
    assert!(auth.policy().load().jwt.is_some());
    assert!(!reload());
    folder.write("policy.toml", "[tenants.b]\nmodels = [\"*\"]");
    assert!(reload());
    assert!(auth.policy().load().tenants["b"].may_call("minilm"));
    std::fs::remove_file(&path).unwrap();
    assert!(!reload());
    assert_eq!(reason(&auth, &head).await, "key_revoked");
}

#[tokio::test]
async fn over_clear_text_no_key_is_accepted_and_the_anonymous_are_served() {
    let folder = Folder::new("clear_text");
    let policy = "anonymous = \"a\"\n[tenants.a]\nmodels = [\"*\"]";
    let path = folder.write("policy.toml", policy);
    let auth = auth(&path, None);
    let none = auth.caller(&HeaderMap::new(), &Peer::default()).await;
    assert_eq!(&*none.unwrap().credential, "anonymous");
    auth.refuse_clear_text();
    assert!(
        auth.caller(&HeaderMap::new(), &Peer::default())
            .await
            .is_ok()
    );
    for (name, value) in [
        ("authorization", "Bearer andon_a_b"),
        ("authorization", "Bearer eyJ.eyJ.c"),
        ("authorization", "Basic x"),
        ("x-api-key", "andon_a_b"),
        ("api-key", "anything"),
    ] {
        let headers = headers(&[(name, value)]);
        let refused = auth.caller(&headers, &Peer::default()).await;
        assert!(refused.unwrap_err().to_string().contains("clear text"));
    }
}

#[tokio::test]
async fn without_a_policy_everybody_may_do_everything() {
    let auth = Auth::new(&AuthSettings::default()).unwrap();
    let caller = auth
        .caller(&headers(&[("x-api-key", "any")]), &Peer::default())
        .await
        .unwrap();
    assert!(caller.must_administrate().is_ok() && caller.must_be_allowed("any").is_ok());
    assert!(!auth.is_required() && auth.reflection_is_open());
}

#[tokio::test]
async fn without_a_policy_nobody_on_another_machine_is_an_administrator() {
    let peer = |address: &str| Peer {
        address: Some(address.parse().unwrap()),
        ..Peer::default()
    };
    for (address, insecure_admin, administrates) in [
        ("127.0.0.1:5", false, true),
        ("[::1]:5", false, true),
        ("[::ffff:127.0.0.1]:5", false, true),
        ("10.0.0.7:5", false, false),
        ("[::ffff:10.0.0.7]:5", false, false),
        ("[2001:db8::7]:5", false, false),
        ("10.0.0.7:5", true, true),
    ] {
        let settings = AuthSettings {
            insecure: true,
            insecure_admin,
            ..AuthSettings::default()
        };
        let auth = Auth::new(&settings).unwrap();
        let caller = auth.caller(&HeaderMap::new(), &peer(address)).await;
        let caller = caller.unwrap();
        assert!(caller.must_be_allowed("any").is_ok(), "{address}");
        let administrator = caller.must_administrate();
        assert_eq!(administrator.is_ok(), administrates, "{address}");
        if let Err(error) = administrator {
            assert_eq!(error.kind(), Kind::Forbidden);
            assert!(error.to_string().contains("--insecure-admin"), "{error}");
        }
    }
}

proptest! {
    #[test]
    fn no_bytes_of_a_caller_break_anything(
        bearer in proptest::collection::vec(any::<u8>(), 0..200),
        parts in proptest::collection::vec("[A-Za-z0-9_-]{0,60}", 0..5),
    ) {
        let folder = Folder::new("bytes");
        let keys = Keys::default();
        let text = parts.join(".");
        prop_assert!(keys.caller(&text, SystemTime::now()).is_err());
        let key = format!("andon_{text}");
        prop_assert!(keys.caller(&key, SystemTime::now()).is_err());
        if let Ok(value) = HeaderValue::from_bytes(&bearer) {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, value);
            let _ = credential(&headers);
        }
        let text = String::from_utf8_lossy(&bearer);
        let _ = jwks::KeySet::parse(text.clone().into_owned());
        let _ = keys::parse(&text);
        let _ = Policy::parse(&text, &folder.0);
    }
}
